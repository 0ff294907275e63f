// nodemailer-mail-tracking in express, as its README shows: what it calls for each open stores a row.
"use strict";
const express = require("express");
const { expressApp } = require("nodemailer-mail-tracking");
const { serve } = require("./node_server.js");

serve((database) => {
  const event = database.prepare("insert into events (email, created_at) values (?, ?)");
  const app = express();
  app.use(
    "/mail-track",
    expressApp({
      baseUrl: "http://127.0.0.1/mail-track",
      jwtSecret: process.env.BENCH_SECRET,
      getData: (data) => data,
      onBlankImageView: (data) => event.run(data.recipient, new Date().toISOString()),
      onLinkClick: () => {},
    }),
  );
  return app;
});
