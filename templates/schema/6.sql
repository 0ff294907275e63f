-- From schema version 5 (0.6) to 6 (0.7).
begin;

alter table emails add column told_at integer not null default 0;
alter table emails add column cleared integer not null default 0;

alter table tenants add column unregistered_a_day integer check (unregistered_a_day >= 0);

create table allowances (                -- how many new things hits alone brought: on a day; day -1: of a campaign that was declared
    tenant   integer not null references tenants (number),
    day      integer not null,
    what     text not null,              -- one of A_DAY
    whose    text not null,              -- a campaign; of URLs, a registered email's key; '': the tenant's
    network  integer not null,           -- a number for it; -1: of all
    used     integer not null,
    primary key (tenant, day, what, whose, network)
) without rowid;

insert into allowances
select tenant, day, 'unregistered', '', -1, emails from unregistered_days
union all
select tenant, -1, 'unregistered', campaign, -1, count(*) from emails where registered = 0 and campaign <> '' group by tenant, campaign;

drop table unregistered_days;

create index dropped_by_day on dropped (day);

create table marks (
    name  text primary key,
    value text not null
) without rowid;

create table gone (                      -- emails that were deleted: no hit and no registration up to a time makes them again
    hash text primary key,               -- keyed; see gone_hashes
    at   integer not null
) without rowid;

pragma user_version = 6;
commit;
