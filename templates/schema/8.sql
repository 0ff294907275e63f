-- From schema version 7 to 8.
begin;

drop index events_by_url;
create index events_by_url on events (url, at) where url is not null;

alter table tenants add column retention_days integer check (retention_days >= 0);
alter table tenants add column ignore_gpc integer not null default 0 check (ignore_gpc in (0, 1));

create table shares (
    hash       text primary key check (length(hash) = 64),
    tenant     integer not null references tenants (number),
    campaign   text not null check (length(campaign) <= 200),
    created_at integer not null,
    ends_at    integer not null
) without rowid;

create table feeds (
    tenant integer not null references tenants (number),
    epoch  text not null,
    last   integer not null default 0,
    swept  integer not null default 0,
    primary key (tenant)
) without rowid;

create table webhooks (
    tenant   integer not null references tenants (number),
    url      text not null check (length(url) between 1 and 2000),
    types    text not null,
    people_only integer not null check (people_only in (0, 1)),
    secrets  text not null,
    position integer not null,
    failing_since integer,
    trouble  text not null,
    off      integer not null check (off in (0, 1)),
    primary key (tenant, url)
) without rowid;

create table changes (
    tenant integer not null,
    number integer not null,
    at     integer not null,
    email  integer not null,
    event  integer not null,
    before integer,
    after  integer not null,
    primary key (tenant, number)
) without rowid;
create index changes_by_email on changes (email, event);

create table carried (
    tenant integer not null,
    rollup text not null,
    key    text not null,
    name   text not null,
    number integer not null,
    primary key (tenant, rollup, key, name)
) without rowid;

create table gone_of_kinds (
    hash text not null,
    kind text not null,
    at   integer not null,
    primary key (hash, kind)
) without rowid;

insert into gone_of_kinds select hash, 'deleted', at from gone;

drop table gone;

alter table gone_of_kinds rename to gone;

alter table cohorts add column click_only_unconfirmed integer not null default 0;
alter table campaigns add column click_only_unconfirmed integer not null default 0;
alter table campaign_times add column click_only_unconfirmed integer not null default 0;
drop view if exists campaign_details;
drop view if exists recount_cohorts;
drop view if exists recount_campaigns;
drop view if exists recount_campaign_times;

create view campaign_details as          -- campaigns as tables show them: those in which there is anything
select campaign as id, 0 as at, tenant, campaign, emails, opened_person, opened_unconfirmed, opened_machine,
       clicked_person, clicked_unconfirmed, clicked_machine, click_only, click_only_unconfirmed,
       coalesce((select min(created_at) from emails
                 where emails.tenant = campaigns.tenant and emails.campaign = campaigns.campaign
                 and emails.campaign <> ''),
                (select sent_at from campaign_sends
                 where campaign_sends.tenant = campaigns.tenant and campaign_sends.campaign = campaigns.campaign)
       ) as first_email_at, last_at as last_hit_at
from campaigns
where emails + opened_person + opened_unconfirmed + opened_machine
      + clicked_person + clicked_unconfirmed + clicked_machine + click_only > 0;

create view recount_cohorts as
with quarters as (
    select tenant, quarter, sum(in_cohort) as emails,
           count(case when opened = 1 then 1 end) as opened_person,
           count(case when opened = 2 then 1 end) as opened_unconfirmed,
           count(case when opened = 3 then 1 end) as opened_machine,
           count(case when clicked = 1 then 1 end) as clicked_person,
           count(case when clicked = 2 then 1 end) as clicked_unconfirmed,
           count(case when clicked = 3 then 1 end) as clicked_machine,
           count(case when clicked = 1 and coalesce(opened, 0) <> 1 then 1 end) as click_only,
           count(case when clicked = 1 and opened = 2 then 1 end) as click_only_unconfirmed
    from recount_groups
    group by tenant, quarter
)
select tenant, 0 as grain, quarter as time, emails, opened_person, opened_unconfirmed, opened_machine,
       clicked_person, clicked_unconfirmed, clicked_machine, click_only, click_only_unconfirmed
from quarters
union all
select tenant, 1, local_day(tz, quarter), sum(emails), sum(opened_person), sum(opened_unconfirmed), sum(opened_machine),
       sum(clicked_person), sum(clicked_unconfirmed), sum(clicked_machine), sum(click_only), sum(click_only_unconfirmed)
from quarters
join tenants on tenants.number = quarters.tenant
where quarter >= 0
group by tenant, local_day(tz, quarter);

create view recount_campaigns as
select tenant, campaign, sum(in_campaign) as emails,
       count(case when opened = 1 then 1 end) as opened_person,
       count(case when opened = 2 then 1 end) as opened_unconfirmed,
       count(case when opened = 3 then 1 end) as opened_machine,
       count(case when clicked = 1 then 1 end) as clicked_person,
       count(case when clicked = 2 then 1 end) as clicked_unconfirmed,
       count(case when clicked = 3 then 1 end) as clicked_machine,
       count(case when clicked = 1 and coalesce(opened, 0) <> 1 then 1 end) as click_only,
       count(case when clicked = 1 and opened = 2 then 1 end) as click_only_unconfirmed,
       max(last_at) as last_at
from recount_groups
where campaign <> ''
group by tenant, campaign;

create view recount_campaign_times as
with moments (tenant, campaign, time, sent, opened, clicked, click_only, unsure) as (
    select tenant, campaign, sent_at / 900000, 1, 0, 0, 0, 0
    from email_standings where registered = 1 and substr(key, 1, 9) <> 'selftest~'
    union all
    select tenant, campaign, sent_at / 900000, sent, 0, 0, 0, 0
    from campaign_sends
    union all
    select tenant, campaign, opened_at / 900000, 0, opened, 0, 0, 0
    from email_standings where opened is not null and substr(key, 1, 9) <> 'selftest~'
    union all
    select tenant, campaign, clicked_at / 900000, 0, 0, clicked, case when coalesce(opened, 0) <> 1 then clicked end, 0
    from email_standings where clicked is not null and substr(key, 1, 9) <> 'selftest~'
    union all
    select tenant, campaign, case when opened_at > clicked_at then opened_at else clicked_at end / 900000, 0, 0, 0, 0, 1
    from email_standings where clicked = 1 and opened = 2 and substr(key, 1, 9) <> 'selftest~'
), quarters as (
    select tenant, campaign, time, sum(sent) as emails,
           count(case when opened = 1 then 1 end) as opened_person,
           count(case when opened = 2 then 1 end) as opened_unconfirmed,
           count(case when opened = 3 then 1 end) as opened_machine,
           count(case when clicked = 1 then 1 end) as clicked_person,
           count(case when clicked = 2 then 1 end) as clicked_unconfirmed,
           count(case when clicked = 3 then 1 end) as clicked_machine,
           count(case when click_only = 1 then 1 end) as click_only,
           sum(unsure) as click_only_unconfirmed
    from moments where campaign <> '' group by tenant, campaign, time
)
select tenant, campaign, 0 as grain, time, emails, opened_person, opened_unconfirmed, opened_machine,
       clicked_person, clicked_unconfirmed, clicked_machine, click_only, click_only_unconfirmed
from quarters
union all
select tenant, campaign, 1, local_day(tz, time), sum(emails), sum(opened_person), sum(opened_unconfirmed),
       sum(opened_machine), sum(clicked_person), sum(clicked_unconfirmed), sum(clicked_machine), sum(click_only),
       sum(click_only_unconfirmed)
from quarters
join tenants on tenants.number = quarters.tenant
group by tenant, campaign, local_day(tz, time);

update cohorts set click_only_unconfirmed = counted.click_only_unconfirmed
from recount_cohorts as counted where counted.tenant = cohorts.tenant and counted.grain = cohorts.grain and counted.time = cohorts.time;
update campaigns set click_only_unconfirmed = counted.click_only_unconfirmed
from recount_campaigns as counted where counted.tenant = campaigns.tenant and counted.campaign = campaigns.campaign;
update campaign_times set click_only_unconfirmed = counted.click_only_unconfirmed
from recount_campaign_times as counted where counted.tenant = campaign_times.tenant and counted.campaign = campaign_times.campaign and counted.grain = campaign_times.grain and counted.time = campaign_times.time;

pragma user_version = 8;
commit;
