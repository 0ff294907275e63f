-- From schema version 5 (0.6) to 6 (0.7).
begin;

alter table emails add column told_at integer not null default 0;
alter table emails add column cleared integer not null default 0;

alter table tenants add column unregistered_a_day integer check (unregistered_a_day >= 0);

create table allowances (                -- how many emails hits alone made: on a day; day -1: of a campaign that was declared
    tenant   integer not null references tenants (number),
    day      integer not null,
    campaign text not null,
    network  integer not null,           -- a number for it; -1: of all
    emails   integer not null,
    primary key (tenant, day, campaign, network)
) without rowid;

insert into allowances
select tenant, day, '', -1, emails from unregistered_days
union all
select tenant, -1, campaign, -1, count(*) from emails where registered = 0 and campaign <> '' group by tenant, campaign;

drop table unregistered_days;

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
