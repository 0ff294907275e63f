-- From schema version 6 to 7.
begin;

alter table tenants add column utm text not null default '' check (length(utm) <= 1000);

create table rules (
    tenant integer not null references tenants (number),
    rule   text not null check (rule in ('allow', 'block', 'own', 'forward')),
    value  text not null check (length(value) between 1 and 260),
    primary key (tenant, rule, value)
) without rowid;
insert into rules select tenant, rule, value from tenant_rules;
drop table tenant_rules;
alter table rules rename to tenant_rules;

create table campaign_times (             -- of a campaign, by the time that each email was sent, first opened, first clicked as it counts
    tenant   integer not null,
    campaign text not null,
    grain    integer not null,
    time     integer not null,
    emails   integer not null,
    opened_person  integer not null, opened_unconfirmed  integer not null, opened_machine  integer not null,
    clicked_person integer not null, clicked_unconfirmed integer not null, clicked_machine integer not null,
    click_only integer not null,
    primary key (tenant, campaign, grain, time)
) without rowid;

create table campaign_hits (             -- hits, by their campaign: what they were judged, and why; what people opened with
    tenant    integer not null,
    campaign  text not null,
    type      integer not null,
    judgement integer not null,
    client    text not null,             -- this and the device only of opens by people, and of unconfirmed ones
    device    text not null,
    hits      integer not null,
    primary key (tenant, campaign, type, judgement, client, device)
) without rowid;

create view recount_campaign_times as
with moments (tenant, campaign, time, sent, opened, clicked, click_only) as (
    select tenant, campaign, sent_at / 900000, 1, 0, 0, 0
    from email_standings where registered = 1 and substr(key, 1, 9) <> 'selftest~'
    union all
    select tenant, campaign, sent_at / 900000, sent, 0, 0, 0
    from campaign_sends
    union all
    select tenant, campaign, opened_at / 900000, 0, opened, 0, 0
    from email_standings where opened is not null and substr(key, 1, 9) <> 'selftest~'
    union all
    select tenant, campaign, clicked_at / 900000, 0, 0, clicked, case when coalesce(opened, 0) <> 1 then clicked end
    from email_standings where clicked is not null and substr(key, 1, 9) <> 'selftest~'
), quarters as (
    select tenant, campaign, time, sum(sent) as emails,
           count(case when opened = 1 then 1 end) as opened_person,
           count(case when opened = 2 then 1 end) as opened_unconfirmed,
           count(case when opened = 3 then 1 end) as opened_machine,
           count(case when clicked = 1 then 1 end) as clicked_person,
           count(case when clicked = 2 then 1 end) as clicked_unconfirmed,
           count(case when clicked = 3 then 1 end) as clicked_machine,
           count(case when click_only = 1 then 1 end) as click_only
    from moments where campaign <> '' group by tenant, campaign, time
)
select tenant, campaign, 0 as grain, time, emails, opened_person, opened_unconfirmed, opened_machine,
       clicked_person, clicked_unconfirmed, clicked_machine, click_only
from quarters
union all
select tenant, campaign, 1, local_day(tz, time), sum(emails), sum(opened_person), sum(opened_unconfirmed),
       sum(opened_machine), sum(clicked_person), sum(clicked_unconfirmed), sum(clicked_machine), sum(click_only)
from quarters
join tenants on tenants.number = quarters.tenant
group by tenant, campaign, local_day(tz, time);

create view recount_campaign_hits as
with hits (tenant, campaign, type, judgement, agent, hits) as (
    select emails.tenant, campaign, type, judgement, case when type = 1 and state in (1, 2) then agent end, count(*)
    from events
    join emails on emails.id = events.email
    join judgements on judgements.id = events.judgement
    where campaign <> ''
    group by emails.tenant, campaign, type, judgement, case when type = 1 and state in (1, 2) then agent end
)
select tenant, campaign, type, judgement,
       case when agents.id is null then '' else client_name(agents.agent) end as client,
       case when agents.id is null then '' else client_device(agents.agent) end as device, sum(hits) as hits
from hits
left join agents on agents.id = hits.agent
group by tenant, campaign, type, judgement, client, device;

insert into campaign_times (tenant, campaign, grain, time, emails, opened_person, opened_unconfirmed, opened_machine,
    clicked_person, clicked_unconfirmed, clicked_machine, click_only)
select tenant, campaign, grain, time, emails, opened_person, opened_unconfirmed, opened_machine,
    clicked_person, clicked_unconfirmed, clicked_machine, click_only from recount_campaign_times;

insert into campaign_hits (tenant, campaign, type, judgement, client, device, hits)
select tenant, campaign, type, judgement, client, device, hits from recount_campaign_hits;

pragma user_version = 7;
commit;
