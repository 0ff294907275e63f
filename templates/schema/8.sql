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

pragma user_version = 8;
commit;
