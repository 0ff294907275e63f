-- The database of the email tracker. Times are integers: milliseconds since 1970, UTC; a "quarter" is
-- a time divided by 900,000: a quarter of an hour, the finest step in which every time zone begins its day.
-- event_type: 1 open, 2 click. state: 1 person, 2 unconfirmed, 3 machine, 4 set aside (in no number).
begin;

create table secrets (
    name  text primary key,              -- 'link': signs links. 'instance': ties this database to its spool.
    value text not null check (length(value) >= 16)
) without rowid;

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
    tz            text not null default 'UTC' check (length(tz) between 1 and 60)     -- in which its days begin
);

create table tenant_hosts (              -- where a tenant's links may lead, and where they may not
    tenant integer not null references tenants (number),
    rule   text not null check (rule in ('allow', 'block')),
    host   text not null check (length(host) between 3 and 260),
    primary key (tenant, rule, host)
) without rowid;

create table tenant_addresses (          -- which addresses a tenant calls its own: their hits are set aside
    tenant  integer not null references tenants (number),
    network text not null check (length(network) between 2 and 49),
    primary key (tenant, network)
) without rowid;

create table retired_ids (               -- mail ids of removed tenants: mail with them is still out there
    mail_id    text primary key,
    retired_at integer not null
) without rowid;

create table emails (
    id         integer primary key,
    tenant     integer not null references tenants (number),
    key        text not null check (length(key) between 1 and 200),
    subject    text not null default '' check (length(subject) <= 998),               -- RFC 5322 §2.1.1
    recipient  text not null default '' check (length(recipient) <= 320),             -- RFC 3696, erratum 1690
    campaign   text not null default '' check (length(campaign) <= 200),
    registered integer not null check (registered in (0, 1)),  -- 0: known only from its hits
    created_at integer not null,         -- registration, or the earliest hit of an unregistered email
    sent_at    integer check ((sent_at is null) = (registered = 0)),
    delivered_at integer,                -- if the sender said so
    time_said  integer not null default 0 check (time_said in (0, 1)),  -- 0: sent_at is the time of registration
    links      integer check (links >= 0),  -- how many different ones the message has, if that is known
    unique (tenant, key)
);
create index emails_by_age on emails (tenant, created_at);
create index emails_unregistered_by_campaign on emails (tenant, campaign) where registered = 0 and campaign <> '';

create index emails_by_campaign on emails (tenant, campaign, created_at) where campaign <> '';
create index emails_by_recipient on emails (tenant, recipient collate nocase) where recipient <> '';

-- The words of subjects and campaigns, to search for; the text itself is in emails. "owner" is the tenant, as a word.
create virtual table email_words using fts5 (owner, subject, campaign, content = '', detail = column);
create trigger words_of_new_emails after insert on emails when new.subject <> '' or new.campaign <> '' begin
    insert into email_words (rowid, owner, subject, campaign)
    values (new.id, 'tenant' || new.tenant, new.subject, new.campaign);
end;
create trigger words_of_old_emails after delete on emails when old.subject <> '' or old.campaign <> '' begin
    insert into email_words (email_words, rowid, owner, subject, campaign)
    values ('delete', old.id, 'tenant' || old.tenant, old.subject, old.campaign);
end;
create trigger words_of_changed_emails after update of subject, campaign on emails
when new.subject <> old.subject or new.campaign <> old.campaign begin
    insert into email_words (email_words, rowid, owner, subject, campaign)
    select 'delete', old.id, 'tenant' || old.tenant, old.subject, old.campaign where old.subject <> '' or old.campaign <> '';
    insert into email_words (rowid, owner, subject, campaign)
    select new.id, 'tenant' || new.tenant, new.subject, new.campaign where new.subject <> '' or new.campaign <> '';
end;

create table campaign_sends (            -- how many emails of a campaign were sent without being registered, and when
    tenant   integer not null references tenants (number),
    campaign text not null check (length(campaign) between 1 and 200),
    sent     integer not null check (sent >= 0),
    sent_at  integer not null,
    primary key (tenant, campaign)
) without rowid;

create table user_agents (id integer primary key, user_agent text not null unique check (length(user_agent) <= 512));

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

create table event_rows (                -- one row a hit; read them through the view "events"
    id         integer primary key,
    tenant     integer not null references tenants (number),
    email      integer not null references emails (id),
    at         integer not null check (at > 0),
    type       integer not null check (type in (1, 2)),
    method     text check (method in ('HEAD')),                -- null: GET
    judgement  integer not null references judgements (id),
    user_agent integer not null references user_agents (id),
    url        integer references urls (id),
    ip_address text,
    purpose    text,
    own        integer check (own in (1))                      -- 1: from an address that the tenant calls its own
);
create index event_rows_by_email on event_rows (email, at);
create index event_rows_by_tenant on event_rows (tenant, at);
create index event_rows_by_url on event_rows (url) where url is not null;

create view events as
select event_rows.id,
       event_rows.email as email_id,
       case event_rows.type when 1 then 'open' else 'click' end as event_type,
       strftime('%Y-%m-%dT%H:%M:%fZ', event_rows.at / 1000.0, 'unixepoch') as timestamp,
       user_agents.user_agent,
       event_rows.ip_address,
       urls.url,
       coalesce(event_rows.method, 'GET') as method,
       judgements.verdict,
       judgements.reason,
       event_rows.tenant
from event_rows
join judgements on judgements.id = event_rows.judgement
join user_agents on user_agents.id = event_rows.user_agent
left join urls on urls.id = event_rows.url;

-- Counts of one email, and of one link in one email: how many hits of each state, and the earliest.
-- The best state (person, then unconfirmed, then machine) is the one an email is unique under.
-- Also its last session (hits apart by at most 15 minutes each): when it ended, how many hits it has, and how many of
-- scanners and bots, so that a hit that comes next can mostly be judged without reading them.
create table email_counts (
    email integer primary key references emails (id),
    open_person       integer not null, open_person_first       integer,
    open_unconfirmed  integer not null, open_unconfirmed_first  integer,
    open_machine      integer not null, open_machine_first      integer,
    click_person      integer not null, click_person_first      integer,
    click_unconfirmed integer not null, click_unconfirmed_first integer,
    click_machine     integer not null, click_machine_first     integer,
    last_at integer, session_hits integer not null default 0, session_machines integer not null default 0
);

create table link_counts (
    email integer not null references emails (id),
    url   integer not null references urls (id),
    click_person      integer not null, click_person_first      integer,
    click_unconfirmed integer not null, click_unconfirmed_first integer,
    click_machine     integer not null, click_machine_first     integer,
    primary key (email, url)
) without rowid;

create view email_bests as               -- under which state each email is unique, and since when
select email, 1 as type,
       case when open_person then 1 when open_unconfirmed then 2 else 3 end as state,
       case when open_person then open_person_first when open_unconfirmed then open_unconfirmed_first
            else open_machine_first end as at
from email_counts where open_person or open_unconfirmed or open_machine
union all
select email, 2,
       case when click_person then 1 when click_unconfirmed then 2 else 3 end,
       case when click_person then click_person_first when click_unconfirmed then click_unconfirmed_first
            else click_machine_first end
from email_counts where click_person or click_unconfirmed or click_machine;

-- Roll-ups: what the dashboard reads. Each equals a recount of the tables above ("tracker.py check").
create table activity (                  -- by the time of the hit; uniques by the time an email became unique
    tenant  integer not null,
    quarter integer not null,
    type    integer not null,
    state   integer not null,
    hits    integer not null,
    emails  integer not null,
    primary key (tenant, quarter, type, state)
) without rowid;

create table reasons (                   -- hits by the time of the hit: what they were judged, and why
    tenant    integer not null,
    quarter   integer not null,
    type      integer not null,
    judgement integer not null,
    hits      integer not null,
    primary key (tenant, quarter, type, judgement)
) without rowid;

create table cohorts (                   -- by the time of sending; quarter -1: emails nobody registered
    tenant  integer not null,
    quarter integer not null,
    emails  integer not null,
    opened_person  integer not null, opened_unconfirmed  integer not null, opened_machine  integer not null,
    clicked_person integer not null, clicked_unconfirmed integer not null, clicked_machine integer not null,
    click_only integer not null default 0,  -- a person clicked, though no open by a person was seen
    primary key (tenant, quarter)
) without rowid;

create table campaigns (
    tenant   integer not null,
    campaign text not null,
    emails   integer not null,
    opened_person  integer not null, opened_unconfirmed  integer not null, opened_machine  integer not null,
    clicked_person integer not null, clicked_unconfirmed integer not null, clicked_machine integer not null,
    click_only integer not null default 0,  -- a person clicked, though no open by a person was seen
    last_at  integer,                     -- when its last hit came
    primary key (tenant, campaign)
) without rowid;

-- The same by days, which begin at midnight in the tenant's own zone and are counted from 1970: for long ranges.
create table activity_days (
    tenant integer not null,
    day    integer not null,
    type   integer not null,
    state  integer not null,
    hits   integer not null,
    emails integer not null,
    primary key (tenant, day, type, state)
) without rowid;

create table reason_days (
    tenant    integer not null,
    day       integer not null,
    type      integer not null,
    judgement integer not null,
    hits      integer not null,
    primary key (tenant, day, type, judgement)
) without rowid;

create table cohort_days (
    tenant integer not null,
    day    integer not null,
    emails integer not null,
    opened_person  integer not null, opened_unconfirmed  integer not null, opened_machine  integer not null,
    clicked_person integer not null, clicked_unconfirmed integer not null, clicked_machine integer not null,
    click_only integer not null,
    primary key (tenant, day)
) without rowid;

create table client_days (               -- opens by what people read with; repeats and machines are in none
    tenant integer not null,
    day    integer not null,
    client text not null,
    device text not null,
    opens_person      integer not null,
    opens_unconfirmed integer not null,
    primary key (tenant, day, client, device)
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

create table named_hosts (               -- plain links that met the naming page
    tenant integer not null,
    host   text not null,
    reason text not null,
    clicks integer not null,
    primary key (tenant, host, reason)
) without rowid;

create table unregistered_days (         -- how many emails hits made in a day (see UNREGISTERED_A_DAY)
    tenant integer not null,
    day    integer not null,
    emails integer not null,
    primary key (tenant, day)
) without rowid;

create table dropped (                   -- hits that became no event, by reason; tenant 0: nobody's
    tenant integer not null,
    reason text not null,
    day    integer not null,
    hits   integer not null,
    primary key (tenant, reason, day)
) without rowid;

create table positions (                 -- how far each segment of the spool is drained, in bytes
    segment    text primary key,
    position   integer not null check (position >= 0),
    updated_at integer not null
) without rowid;

create table ingested (hit_id text primary key) without rowid;

pragma user_version = 4;
commit;
