// Judges documents by JSON Schema 2020-12 with ajv: [{schema, documents}] on stdin, for each document where it is wrong.
"use strict";
const { readFileSync } = require("node:fs");
const Ajv2020 = require("ajv/dist/2020").default;
const addFormats = require("ajv-formats").default;

const judged = JSON.parse(readFileSync(0, "utf8")).map(({ schema, documents }) => {
  const ajv = new Ajv2020({ allErrors: true, strict: true, allowUnionTypes: true, strictTypes: false, allowMatchingProperties: true });
  addFormats(ajv);
  ajv.addKeyword("x-listed");
  const validate = ajv.compile(schema);
  return documents.map((document) => (validate(document) ? [] : validate.errors.map((one) => one.instancePath)));
});
process.stdout.write(JSON.stringify(judged));
