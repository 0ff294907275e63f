-- What differs in PostgreSQL from SQLite, and why:
--    parameters           are written otherwise by psycopg, and say no type: the statement does
--    types, identities    bigint, since SQLite's integers have 64 bits; texts are in the order of their bytes, as there
--    URLs                 are unique by their hash: an entry of an index has 2,700 bytes at most
--    sets                 are JSON here too, which is read otherwise
--    executemany          is one statement over JSON: a statement a row would be a round trip a row
--    nearest events       are read by a lateral join: an `in` that depends on the outer row is run for every event
--    sum()                is numeric, and read as a whole number
--    views' functions     local_day is written in SQL; what Python knows of clients comes in a table: see know_clients
--    pragma, write.lock   the mark `schema` holds the version, and its row is locked by who writes, on any machine
--    positions            are locked too, and set only from what was read: an engine may lose a lock, not a row
--
-- What schema.sql, which comes in between, needs in PostgreSQL; and views for people and their programs, who may read all
-- tables: times are times there, and what is a number in the tables is a word.
create table agent_clients (agent text collate "C" primary key, client text not null, device text not null);
create function client_name(agent text) returns text language sql stable as
    'select client from agent_clients where agent_clients.agent = $1';
create function client_device(agent text) returns text language sql stable as
    'select device from agent_clients where agent_clients.agent = $1';
create function local_day(zone text, quarter bigint) returns bigint language sql stable as
    $$ select (timezone(zone, to_timestamp(900 * quarter))::date - date '1970-01-01')::bigint $$;
create function time_of(ms bigint) returns timestamp with time zone language sql immutable as
    'select to_timestamp(ms / 1000.0)';
create function state_name(state bigint) returns text language sql immutable as
    $$ select (array['person', 'unconfirmed', 'machine', 'set_aside'])[state] $$;
insert into marks values ('schema', '');
@@schema
do $$                                    -- numbers go on behind those of a copy
declare each record;
begin
    for each in select table_name, column_name from information_schema.columns
                where table_schema = current_schema() and is_identity = 'YES'
    loop
        execute format('select setval(pg_get_serial_sequence(%1$L, %2$L), max(%2$I)) from %1$I',
                       each.table_name, each.column_name);
    end loop;
end $$;
create view readable_emails as
select tenants.name as tenant, key, subject, recipient, campaign, registered = 1 as registered,
       time_of(email_details.created_at) as created_at, time_of(sent_at) as sent_at, time_of(delivered_at) as delivered_at,
       opens_person, opens_unconfirmed, opens_machine, opened_as, time_of(opened_at) as opened_at,
       clicks_person, clicks_unconfirmed, clicks_machine, clicked_as, time_of(clicked_at) as clicked_at
from email_details
join tenants on tenants.number = email_details.tenant;

create view readable_events as
select tenants.name as tenant, key, time_of(at) as at, event_type, method, state_name(state) as counts_as, verdict, reason,
       url, agent, address, purpose
from event_details
join tenants on tenants.number = event_details.tenant;

create view readable_campaigns as
select tenants.name as tenant, campaign, emails, opened_person, opened_unconfirmed, opened_machine,
       clicked_person, clicked_unconfirmed, clicked_machine, click_only,
       time_of(first_email_at) as first_email_at, time_of(last_hit_at) as last_hit_at
from campaign_details
join tenants on tenants.number = campaign_details.tenant;

create view readable_links as
select tenants.name as tenant, campaign, urls.url, clicks_person, clicks_unconfirmed, clicks_machine,
       emails_person, emails_unconfirmed, emails_machine
from links
join urls on urls.id = links.url
join tenants on tenants.number = links.tenant;

create view readable_quarters as         -- hits in each quarter of an hour
select tenants.name as tenant, to_timestamp(900 * time) as begins_at, case type when 1 then 'open' else 'click' end as event_type,
       state_name(state) as counts_as, verdict, reason, hits
from reasons
join judgements on judgements.id = reasons.judgement
join tenants on tenants.number = reasons.tenant
where grain = 0;
