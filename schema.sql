-- The database of the email tracker. Times are integers: milliseconds since 1970, UTC. A "quarter" is a time divided by
-- 900,000: a quarter of an hour, the finest step in which a time zone begins its day. A day is counted from 1970.
-- type: 1 open, 2 click. state: 1 person, 2 unconfirmed, 3 machine, 4 set aside (in no number). Flags are 0 and 1.
begin;

create table secrets (
    name  text primary key,              -- 'link': signs links. 'instance': ties this database to its spool.
    value text not null check (length(value) >= 16)
) without rowid;

-- Tenants

create table tenants (
    number        integer primary key autoincrement,  -- never another tenant's again
    id            text not null unique check (length(id) between 3 and 64),           -- dashboard id: private
    mail_id       text not null unique check (length(mail_id) between 3 and 64),      -- stands in mail
    name          text not null check (length(name) between 1 and 200),
    tracking_host text unique check (length(tracking_host) <= 253),
    any_domain    integer not null default 0 check (any_domain in (0, 1)),
    suspended     integer not null default 0 check (suspended in (0, 1)),
    api_key_hash  text check (length(api_key_hash) = 64),                             -- SHA-256, hexadecimal
    id_in_mail_at integer,               -- when a hit last carried the dashboard id; null: never
    created_at    integer not null,
    tz            text not null default 'UTC' check (length(tz) between 1 and 60),    -- in which its days begin
    unregistered_a_day integer check (unregistered_a_day >= 0),                       -- emails that hits alone may make; null: as usual
    utm           text not null default '' check (length(utm) <= 1000),               -- what its links' targets get
    retention_days integer check (retention_days >= 0),                               -- 0: for ever; null: RETENTION_DAYS
    ignore_gpc    integer not null default 0 check (ignore_gpc in (0, 1))             -- whether Sec-GPC and DNT change nothing
);

create table tenant_rules (              -- hosts where its links may and may not lead; its own addresses; parameters that links forward
    tenant integer not null references tenants (number),
    rule   text not null check (rule in ('allow', 'block', 'own', 'forward')),
    value  text not null check (length(value) between 1 and 260),
    primary key (tenant, rule, value)
) without rowid;

create table shares (                    -- addresses that can only read a tenant's numbers
    hash       text primary key check (length(hash) = 64),                            -- of the id in the dashboard's place: SHA-256
    tenant     integer not null references tenants (number),
    campaign   text not null check (length(campaign) <= 200),                         -- the only one that it shows; '': all
    created_at integer not null,
    ends_at    integer not null
) without rowid;

create table retired_ids (               -- mail ids of removed tenants: mail with them is still out there
    mail_id    text primary key,
    retired_at integer not null
) without rowid;

-- Facts

create table emails (
    id         integer primary key,
    tenant     integer not null references tenants (number),
    key        text not null check (length(key) between 1 and 200),
    subject    text not null default '' check (length(subject) <= 998),               -- RFC 5322 §2.1.1
    recipient  text not null default '' check (length(recipient) <= 320),             -- RFC 3696, erratum 1690
    campaign   text not null default '' check (length(campaign) <= 200),
    registered integer not null check (registered in (0, 1)),                         -- 0: known only from its hits
    created_at integer not null,         -- registration, or the earliest hit of an unregistered email
    sent_at    integer check ((sent_at is null) = (registered = 0)),
    delivered_at integer,                -- if the sender said so
    time_said  integer not null default 0 check (time_said in (0, 1)),                -- 0: sent_at is the time of registration
    links      integer check (links >= 0),                                            -- different ones, if that is known
    search     text not null default '', -- its texts folded, to search in; '' where it has none but its key
    told_at    integer not null default 0,                                            -- when the last word on it was said
    cleared    integer not null default 0,                                            -- bits: texts that were said to be empty
    unique (tenant, key)
);
create index emails_by_age on emails (tenant, created_at, id);
create index emails_by_campaign on emails (tenant, campaign, created_at, id) where campaign <> '';
create index emails_unregistered_by_campaign on emails (tenant, campaign) where registered = 0 and campaign <> '';
create index emails_by_recipient on emails (tenant, lower(recipient)) where recipient <> '';

create table campaign_sends (            -- how many emails of a campaign were sent without being registered, and when
    tenant   integer not null references tenants (number),
    campaign text not null check (length(campaign) between 1 and 200),
    sent     integer not null check (sent >= 0),
    sent_at  integer not null,
    primary key (tenant, campaign)
) without rowid;

-- What many events share, stored once. Nothing references these but "check", which looks: an index for each would cost
-- every event.
create table agents (
    id    integer primary key,
    agent text not null unique check (length(agent) <= 512)
);

create table urls (
    id     integer primary key,
    tenant integer not null references tenants (number),
    url    text not null check (length(url) <= 4096),
    host   text not null,
    unique (tenant, url)
);

create table judgements (                -- the few pairs of verdict and reason that occur
    id      integer primary key,
    verdict text not null,
    reason  text not null,
    state   integer not null check (state between 1 and 4),
    unique (verdict, reason, state)
);

create table events (                    -- a row a hit, as it was judged
    id        integer primary key,
    tenant    integer not null,                               -- its email's
    email     integer not null references emails (id),
    at        integer not null check (at > 0),
    type      integer not null check (type in (1, 2)),
    method    text check (method in ('HEAD')),                -- null: GET
    judgement integer not null,
    agent     integer not null,
    url       integer,
    address   text,
    purpose   text,
    own       integer not null default 0 check (own in (0, 1)),    -- 1: from an address that the tenant calls its own
    fixed     integer not null default 0 check (fixed in (0, 1))   -- 1: what it was judged by was cut; it stays as it was judged
);
create index events_by_email on events (email, at);
create index events_by_tenant on events (tenant, at);
create index events_by_url on events (url, at) where url is not null;

create view event_details as             -- events with all that is stored elsewhere
select events.id, events.tenant, events.email, emails.key, events.at, events.type,
       case events.type when 1 then 'open' else 'click' end as event_type,
       coalesce(events.method, 'GET') as method,
       judgements.verdict, judgements.reason, judgements.state,
       urls.url, urls.host, agents.agent, events.address, events.purpose, events.own, events.fixed
from events
join emails on emails.id = events.email
join judgements on judgements.id = events.judgement
join agents on agents.id = events.agent
left join urls on urls.id = events.url;

-- Counts of one email, and of one link in one email: how many hits of each state, and the earliest. The best state
-- (person, then unconfirmed, then machine) is the one an email is unique under. Numbers refer to nothing by constraint, so
-- that they can be counted again in a damaged database as well.
create table email_counts (
    email integer primary key,
    open_person       integer not null, open_person_first       integer,
    open_unconfirmed  integer not null, open_unconfirmed_first  integer,
    open_machine      integer not null, open_machine_first      integer,
    click_person      integer not null, click_person_first      integer,
    click_unconfirmed integer not null, click_unconfirmed_first integer,
    click_machine     integer not null, click_machine_first     integer,
    last_at integer not null             -- when its last hit came, whatever it counts as
);

create table link_counts (
    email integer not null,
    url   integer not null,
    click_person      integer not null, click_person_first      integer,
    click_unconfirmed integer not null, click_unconfirmed_first integer,
    click_machine     integer not null, click_machine_first     integer,
    primary key (email, url)
) without rowid;

create view email_details as             -- emails as tables show them
select emails.id, emails.tenant, emails.created_at as at, emails.key, emails.subject, emails.recipient, emails.campaign,
       emails.registered, emails.created_at, emails.sent_at, emails.delivered_at,
       coalesce(emails.sent_at, emails.created_at) as began_at,
       coalesce(open_person, 0) as opens_person,
       coalesce(open_unconfirmed, 0) as opens_unconfirmed,
       coalesce(open_machine, 0) as opens_machine,
       case when open_person > 0 then 'person' when open_unconfirmed > 0 then 'unconfirmed'
            when open_machine > 0 then 'machine' end as opened_as,
       coalesce(open_person_first, open_unconfirmed_first, open_machine_first) as opened_at,
       coalesce(click_person, 0) as clicks_person,
       coalesce(click_unconfirmed, 0) as clicks_unconfirmed,
       coalesce(click_machine, 0) as clicks_machine,
       case when click_person > 0 then 'person' when click_unconfirmed > 0 then 'unconfirmed'
            when click_machine > 0 then 'machine' end as clicked_as,
       coalesce(click_person_first, click_unconfirmed_first, click_machine_first) as clicked_at
from emails
left join email_counts on email_counts.email = emails.id;

create table feeds (                     -- of tenants whose changes are kept: how they are numbered, without a gap
    tenant integer not null references tenants (number),
    epoch  text not null,                -- another one after each restore
    last   integer not null default 0,
    swept  integer not null default 0,   -- the last one that is too old to be kept
    primary key (tenant)
) without rowid;

create table webhooks (                  -- where changes are sent to
    tenant   integer not null references tenants (number),
    url      text not null check (length(url) between 1 and 2000),
    types    text not null,
    people_only integer not null check (people_only in (0, 1)),
    secrets  text not null,
    position integer not null,           -- the number up to which all was sent
    failing_since integer,
    trouble  text not null,
    off      integer not null check (off in (0, 1)),
    primary key (tenant, url)
) without rowid;

create table changes (                   -- what became of hits, for who follows it, in the order of commits
    tenant integer not null,
    number integer not null,
    at     integer not null,             -- when it was counted so
    email  integer not null,
    event  integer not null,
    before integer,                      -- what it was judged; null: it is new
    after  integer not null,
    primary key (tenant, number)
) without rowid;
create index changes_by_email on changes (email, event);

-- Roll-ups: what pages read. Each equals its view recount_… below ("tracker.py check").
-- grain: 0 quarters in UTC, for any time zone; 1 days in the tenant's own zone, for long ranges.

create table uniques (                   -- emails, by the time they first had the state that they are unique under
    tenant integer not null,
    grain  integer not null,
    time   integer not null,
    type   integer not null,
    state  integer not null,
    emails integer not null,
    primary key (tenant, grain, time, type, state)
) without rowid;

create table reasons (                   -- hits, by their time: what they were judged, and why
    tenant    integer not null,
    grain     integer not null,
    time      integer not null,
    type      integer not null,
    judgement integer not null,
    hits      integer not null,
    primary key (tenant, grain, time, type, judgement)
) without rowid;

create table cohorts (                   -- emails, by the time of sending; quarter -1: those that nobody registered
    tenant integer not null,
    grain  integer not null,
    time   integer not null,
    emails integer not null,
    opened_person  integer not null, opened_unconfirmed  integer not null, opened_machine  integer not null,
    clicked_person integer not null, clicked_unconfirmed integer not null, clicked_machine integer not null,
    click_only integer not null,         -- a person clicked, though no open by a person was seen
    click_only_unconfirmed integer not null default 0,  -- and of these: there is an unconfirmed one
    primary key (tenant, grain, time)
) without rowid;

create table campaigns (
    tenant   integer not null,
    campaign text not null,
    emails   integer not null default 0,
    opened_person  integer not null default 0, opened_unconfirmed  integer not null default 0,
    opened_machine integer not null default 0, clicked_person      integer not null default 0,
    clicked_unconfirmed integer not null default 0, clicked_machine integer not null default 0,
    click_only integer not null default 0,
    last_at  integer,                    -- when its last hit came
    click_only_unconfirmed integer not null default 0,
    primary key (tenant, campaign)
) without rowid;

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

create table campaign_times (             -- of a campaign, by the time that each email was sent, first opened, first clicked as it counts
    tenant   integer not null,
    campaign text not null,
    grain    integer not null,
    time     integer not null,
    emails   integer not null,
    opened_person  integer not null, opened_unconfirmed  integer not null, opened_machine  integer not null,
    clicked_person integer not null, clicked_unconfirmed integer not null, clicked_machine integer not null,
    click_only integer not null,
    click_only_unconfirmed integer not null default 0,
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

create table links (
    tenant   integer not null,
    campaign text not null,
    url      integer not null,
    clicks_person integer not null, clicks_unconfirmed integer not null, clicks_machine integer not null,
    emails_person integer not null, emails_unconfirmed integer not null, emails_machine integer not null,
    primary key (tenant, url, campaign)
) without rowid;
create index links_by_campaign on links (tenant, campaign);

create table clients (                   -- opens, by what people read with; repeats and machines are in none
    tenant integer not null,
    day    integer not null,
    client text not null,
    device text not null,
    opens_person      integer not null,
    opens_unconfirmed integer not null,
    primary key (tenant, day, client, device)
) without rowid;

create table named_hosts (               -- clicks on plain links that met the naming page
    tenant integer not null,
    host   text not null,
    reason text not null,
    clicks integer not null,
    primary key (tenant, host, reason)
) without rowid;

create table carried (                   -- numbers whose facts are gone, which a recount adds to what it finds
    tenant integer not null,
    rollup text not null,
    key    text not null,                -- JSON: what it has in the key columns of its roll-up, a quarter in place of a day
    name   text not null,                -- of the column
    number integer not null,             -- to be added; of a column that is a time, the first or the last
    primary key (tenant, rollup, key, name)
) without rowid;

-- Recounts, which state each number a second time. local_day, client_name and client_device are functions of the program.

create view recount_email_counts as
select events.email,
       count(case when type = 1 and state = 1 then 1 end) as open_person,
       min(case when type = 1 and state = 1 then at end) as open_person_first,
       count(case when type = 1 and state = 2 then 1 end) as open_unconfirmed,
       min(case when type = 1 and state = 2 then at end) as open_unconfirmed_first,
       count(case when type = 1 and state = 3 then 1 end) as open_machine,
       min(case when type = 1 and state = 3 then at end) as open_machine_first,
       count(case when type = 2 and state = 1 then 1 end) as click_person,
       min(case when type = 2 and state = 1 then at end) as click_person_first,
       count(case when type = 2 and state = 2 then 1 end) as click_unconfirmed,
       min(case when type = 2 and state = 2 then at end) as click_unconfirmed_first,
       count(case when type = 2 and state = 3 then 1 end) as click_machine,
       min(case when type = 2 and state = 3 then at end) as click_machine_first,
       max(at) as last_at
from events
join judgements on judgements.id = events.judgement
group by events.email;

create view recount_link_counts as
select events.email, events.url,
       count(case when state = 1 then 1 end) as click_person,
       min(case when state = 1 then at end) as click_person_first,
       count(case when state = 2 then 1 end) as click_unconfirmed,
       min(case when state = 2 then at end) as click_unconfirmed_first,
       count(case when state = 3 then 1 end) as click_machine,
       min(case when state = 3 then at end) as click_machine_first
from events
join judgements on judgements.id = events.judgement
where type = 2
group by events.email, events.url;

create view email_standings as           -- what each email counts as, and since when
select emails.id as email, emails.tenant, emails.key, emails.campaign, emails.registered,
       coalesce(emails.sent_at, campaign_sends.sent_at) as sent_at,  -- an unregistered email is sent with its campaign
       case when open_person > 0 then 1 when open_unconfirmed > 0 then 2 when open_machine > 0 then 3 end as opened,
       case when open_person > 0 then open_person_first when open_unconfirmed > 0 then open_unconfirmed_first
            else open_machine_first end as opened_at,
       case when click_person > 0 then 1 when click_unconfirmed > 0 then 2 when click_machine > 0 then 3 end as clicked,
       case when click_person > 0 then click_person_first when click_unconfirmed > 0 then click_unconfirmed_first
            else click_machine_first end as clicked_at,
       last_at
from emails
left join email_counts on email_counts.email = emails.id
left join campaign_sends on emails.registered = 0 and campaign_sends.tenant = emails.tenant
    and campaign_sends.campaign = emails.campaign;

create view recount_uniques as
with quarters (tenant, time, type, state, emails) as (
    select tenant, opened_at / 900000, 1, opened, count(*)
    from email_standings where opened is not null group by tenant, opened_at / 900000, opened
    union all
    select tenant, clicked_at / 900000, 2, clicked, count(*)
    from email_standings where clicked is not null group by tenant, clicked_at / 900000, clicked
)
select tenant, 0 as grain, time, type, state, emails
from quarters
union all
select tenant, 1, local_day(tz, time), type, state, sum(emails)
from quarters
join tenants on tenants.number = quarters.tenant
group by tenant, local_day(tz, time), type, state;

create view recount_reasons as
with quarters (tenant, time, type, judgement, hits) as (
    select tenant, at / 900000, type, judgement, count(*)
    from events group by tenant, at / 900000, type, judgement
)
select tenant, 0 as grain, time, type, judgement, hits
from quarters
union all
select tenant, 1, local_day(tz, time), type, judgement, sum(hits)
from quarters
join tenants on tenants.number = quarters.tenant
group by tenant, local_day(tz, time), type, judgement;

create view recount_groups as            -- emails, test emails left out, and those that were declared as sent
select tenant, campaign, coalesce(sent_at / 900000, -1) as quarter,
       case when registered = 1 or sent_at is null then 1 else 0 end as in_cohort,
       registered as in_campaign, opened, clicked, last_at
from email_standings
where substr(key, 1, 9) <> 'selftest~'
union all
select tenant, campaign, sent_at / 900000, sent, sent, null, null, null
from campaign_sends;

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

create view recount_links as
select emails.tenant, emails.campaign, link_counts.url,
       sum(click_person) as clicks_person,
       sum(click_unconfirmed) as clicks_unconfirmed,
       sum(click_machine) as clicks_machine,
       count(case when click_person > 0 then 1 end) as emails_person,
       count(case when click_person = 0 and click_unconfirmed > 0 then 1 end) as emails_unconfirmed,
       count(case when click_person = 0 and click_unconfirmed = 0 and click_machine > 0 then 1 end) as emails_machine
from link_counts
join emails on emails.id = link_counts.email
group by emails.tenant, emails.campaign, link_counts.url;

create view recount_clients as
with opens (tenant, quarter, agent, person, unconfirmed) as (
    select tenant, at / 900000, agent, count(case when state = 1 then 1 end), count(case when state = 2 then 1 end)
    from events
    join judgements on judgements.id = events.judgement
    where type = 1 and state in (1, 2)
    group by tenant, at / 900000, agent
)
select tenant, local_day(tz, quarter) as day, client_name(agents.agent) as client, client_device(agents.agent) as device,
       sum(person) as opens_person, sum(unconfirmed) as opens_unconfirmed
from opens
join tenants on tenants.number = opens.tenant
join agents on agents.id = opens.agent
group by tenant, local_day(tz, quarter), client_name(agents.agent), client_device(agents.agent);

create view recount_named_hosts as
select events.tenant, host, reason, count(*) as clicks
from events
join judgements on judgements.id = events.judgement
join urls on urls.id = events.url
where reason in ('destination-not-allowed', 'destination-blocked', 'suspended')
group by events.tenant, host, reason;

-- Bookkeeping

create table allowances (                -- how many new things hits alone brought: on a day; day -1: of a campaign that was declared
    tenant   integer not null references tenants (number),
    day      integer not null,
    what     text not null,              -- one of A_DAY, or choice: of a recipient's
    whose    text not null,              -- a campaign; of URLs, a registered email's key; '': the tenant's
    network  integer not null,           -- a number for it; -1: of all
    used     integer not null,
    primary key (tenant, day, what, whose, network)
) without rowid;

create table dropped (                   -- hits that became no event, or one without what was over a limit; tenant 0: nobody's
    tenant integer not null,
    reason text not null,
    day    integer not null,
    hits   integer not null,
    primary key (tenant, reason, day)
) without rowid;
create index dropped_by_day on dropped (day);

create table positions (                 -- how far each segment of the spool is drained, in bytes
    segment    text primary key,
    position   integer not null check (position >= 0),
    updated_at integer not null
) without rowid;

create table ingested (hit_id text primary key) without rowid;

create table marks (                     -- what the database knows of itself; see marks_of
    name  text primary key,
    value text not null
) without rowid;

create table gone (                      -- what no hit, registration or backup brings back
    hash text not null,                  -- keyed, of an email's key or a recipient's address; see gone_hashes
    kind text not null,                  -- 'deleted', or 'forgotten', of which the numbers stay
    at   integer not null,              -- what is registered later is there again
    primary key (hash, kind)
) without rowid;

pragma user_version = 8;
commit;
