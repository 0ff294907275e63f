// What the two express trackers share: the database, and a process for each core, as express's page on production says.
"use strict";
const cluster = require("node:cluster");
const Database = require("better-sqlite3");

exports.open = () => {
  const database = new Database(process.env.BENCH_DATABASE);
  database.pragma("journal_mode = WAL"); // as its README says
  database.exec(`
    create table if not exists emails (key text primary key, open_count integer not null default 0);
    create table if not exists events (
        id integer primary key, email text not null, user_agent text, ip_address text, created_at text not null
    );
  `);
  return database;
};

exports.serve = (makeApp) => {
  if (cluster.isPrimary) {
    exports.open().close();
    for (let number = 0; number < Number(process.env.BENCH_WORKERS); number++) cluster.fork();
    process.on("SIGTERM", () => cluster.disconnect(() => process.exit()));
  } else {
    makeApp(exports.open()).listen(process.env.BENCH_SOCKET);
  }
};
