// Reads an AsyncAPI document with the official parser: prints what it has to say and what it found in the document.
"use strict";
const { readFileSync } = require("node:fs");
const { Parser } = require("@asyncapi/parser");

(async () => {
  const { document, diagnostics } = await new Parser().parse(readFileSync(process.argv[2], "utf8"));
  const found = document && {
    version: document.version(),
    channels: document.channels().all().map((one) => one.address()),
    operations: document.operations().all().map((one) => `${one.action()} ${one.id()}`),
    messages: document.messages().all().map((one) => one.id()),
    schemes: document.components().securitySchemes().all().map((one) => one.type()),
  };
  const said = diagnostics.map(({ code, message, severity, path }) => ({ code, message, severity, path: path.join(".") }));
  process.stdout.write(JSON.stringify({ found, diagnostics: said }));
})();
