// A tracker as one writes it in an evening: express, better-sqlite3, one transaction for each hit.
"use strict";
const express = require("express");
const { serve } = require("./node_server.js");

const GIF = Buffer.from("R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7", "base64");

serve((database) => {
  const event = database.prepare(
    "insert into events (email, user_agent, ip_address, created_at) values (?, ?, ?, ?)",
  );
  const count = database.prepare(
    "insert into emails values (?, 1) on conflict (key) do update set open_count = open_count + 1",
  );
  const record = database.transaction((key, agent, address) => {
    event.run(key, agent, address, new Date().toISOString());
    count.run(key);
  });
  const app = express();
  app.get("/pixel/:key.gif", (request, response) => {
    record(request.params.key, request.get("User-Agent"), request.get("X-Forwarded-For"));
    response.set("Cache-Control", "no-store").type("gif").send(GIF);
  });
  return app;
});
