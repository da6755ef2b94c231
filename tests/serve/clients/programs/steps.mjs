// Runs the steps of a client's program against an endpoint; see steps.py.
//
//     ENDPOINT_KEY=sk-... node ask_openai.mjs --url http://127.0.0.1:8000/v1 --model smollm2 [STEP ...]

import assert from "node:assert/strict";
import { parseArgs } from "node:util";

const SHOWN_CHARACTERS = 120;

export const QUESTION = "Which city shall I visit, and for how long?";

export async function run(...steps) {
  const { values, positionals } = parseArgs({
    allowPositionals: true,
    options: {
      url: { type: "string" },
      model: { type: "string" },
      "model-dir": { type: "string" },
      "without-errors": { type: "boolean", default: false },
    },
  });
  const endpoint = { url: values.url, model: values.model, key: process.env.ENDPOINT_KEY };
  assert(endpoint.url && endpoint.model && endpoint.key, "give --url, --model and ENDPOINT_KEY");
  const chosen = steps.filter(
    (step) =>
      (!positionals.length || positionals.includes(step.name)) &&
      !(values["without-errors"] && step.name.startsWith("error")),
  );
  assert(chosen.length >= positionals.length, `no such step among ${positionals}`);
  let hasFailed = false;
  for (const step of chosen) {
    try {
      const shown = JSON.stringify(await step(endpoint)) ?? "";
      console.log(`ok ${step.name}: ${shown.slice(0, SHOWN_CHARACTERS)}`);
    } catch (error) {
      hasFailed = true;
      console.log(`failed ${step.name}`);
      console.log(error);
    }
  }
  process.exit(hasFailed ? 1 : 0);
}

// The error of a promise that must be rejected.
export async function errorOf(promise) {
  const result = await promise.then(
    () => undefined,
    (error) => error,
  );
  assert(result !== undefined, "no error");
  return result;
}

// The text of a stream, which has come in several parts.
export function joined(parts) {
  assert(parts.length > 1, `not streamed: ${parts}`);
  return parts.join("");
}
