// OpenAI's client for JavaScript: https://github.com/openai/openai-node.

import assert from "node:assert/strict";
import OpenAI from "openai";
import { zodResponseFormat, zodTextFormat } from "openai/helpers/zod";
import { z } from "zod";
import { QUESTION, errorOf, joined, run } from "./steps.mjs";

const Trip = z.object({ city: z.enum(["Paris", "Rome"]), days: z.number().int().min(1).max(9) });

const WEATHER = {
  name: "get_weather",
  description: "Get the weather of a city.",
  parameters: {
    type: "object",
    properties: { city: { type: "string", enum: ["Paris", "Rome"] } },
    required: ["city"],
    additionalProperties: false,
  },
};

const connect = (endpoint) =>
  new OpenAI({ baseURL: endpoint.url, apiKey: endpoint.key, maxRetries: 0 });

async function models(endpoint) {
  const names = [];
  for await (const model of connect(endpoint).models.list()) names.push(model.id);
  assert(names.includes(endpoint.model));
  return names;
}

async function responses(endpoint) {
  const client = new OpenAI({ baseURL: endpoint.url, apiKey: endpoint.key });
  const response = await client.responses.create({
    model: endpoint.model,
    instructions: "You are a coding assistant that talks like a pirate",
    input: "Are semicolons optional in JavaScript?",
  });
  return response.output_text;
}

async function responsesStream(endpoint) {
  const stream = await connect(endpoint).responses.create({
    model: endpoint.model,
    input: QUESTION,
    max_output_tokens: 20,
    stream: true,
  });
  const parts = [];
  let last;
  for await (const event of stream) {
    last = event;
    if (event.type === "response.output_text.delta") parts.push(event.delta);
  }
  assert(["response.completed", "response.incomplete"].includes(last.type));
  return joined(parts);
}

async function responsesParse(endpoint) {
  const response = await connect(endpoint).responses.parse({
    model: endpoint.model,
    input: [{ role: "user", content: QUESTION }],
    text: { format: zodTextFormat(Trip, "trip") },
  });
  return Trip.parse(response.output_parsed);
}

async function chat(endpoint) {
  const client = new OpenAI({ baseURL: endpoint.url, apiKey: endpoint.key });
  const completion = await client.chat.completions.create({
    model: endpoint.model,
    messages: [
      { role: "developer", content: "Talk like a pirate." },
      { role: "user", content: QUESTION },
    ],
  });
  return completion.choices[0].message.content;
}

async function chatStream(endpoint) {
  const stream = await connect(endpoint).chat.completions.create({
    model: endpoint.model,
    messages: [{ role: "user", content: QUESTION }],
    max_completion_tokens: 20,
    stream: true,
  });
  const parts = [];
  for await (const chunk of stream) parts.push(chunk.choices[0]?.delta?.content ?? "");
  return joined(parts);
}

async function chatParse(endpoint) {
  const completion = await connect(endpoint).chat.completions.parse({
    model: endpoint.model,
    messages: [{ role: "user", content: QUESTION }],
    response_format: zodResponseFormat(Trip, "trip"),
  });
  return Trip.parse(completion.choices[0].message.parsed);
}

async function chatTools(endpoint) {
  const client = connect(endpoint);
  const tools = [{ type: "function", function: WEATHER }];
  const messages = [{ role: "user", content: QUESTION }];
  const completion = await client.chat.completions.create({
    model: endpoint.model,
    messages,
    tools,
    tool_choice: "required",
    parallel_tool_calls: false,
  });
  const { message } = completion.choices[0];
  assert.equal(completion.choices[0].finish_reason, "tool_calls");
  const results = message.tool_calls.map((call) => ({
    role: "tool",
    tool_call_id: call.id,
    content: "sunny",
  }));
  const answer = await client.chat.completions.create({
    model: endpoint.model,
    messages: [...messages, message, ...results],
    tools,
    max_completion_tokens: 20,
  });
  return [message.tool_calls[0].function.arguments, answer.choices[0].message.content];
}

// Calls the function and sends its result by itself.
async function chatRunTools(endpoint) {
  const called = [];
  const getWeather = ({ city }) => {
    called.push(city);
    return "sunny";
  };
  const runner = connect(endpoint).chat.completions.runTools(
    {
      model: endpoint.model,
      messages: [{ role: "user", content: QUESTION }],
      tools: [
        { type: "function", function: { ...WEATHER, function: getWeather, parse: JSON.parse } },
      ],
      tool_choice: { type: "function", function: { name: "get_weather" } },
    },
    { maxChatCompletions: 2 },
  );
  await runner.done();
  assert(called.length > 0);
  return called;
}

async function completion(endpoint) {
  const told = await connect(endpoint).completions.create({
    model: endpoint.model,
    prompt: "Once upon a time",
    max_tokens: 12,
  });
  return told.choices[0].text;
}

async function embeddings(endpoint) {
  const told = await connect(endpoint).embeddings.create({
    model: endpoint.model,
    input: [QUESTION, "Rome"],
  });
  assert.equal(told.data.length, 2);
  assert.equal(typeof told.data[0].embedding[0], "number");
  return told.data[0].embedding.length;
}

async function errorOfAWrongKey(endpoint) {
  const client = new OpenAI({ baseURL: endpoint.url, apiKey: "sk-wrong", maxRetries: 0 });
  const error = await errorOf(client.models.list());
  assert(error instanceof OpenAI.AuthenticationError);
  assert.equal(error.code, "invalid_api_key");
  return error.message;
}

async function errorOfAnUnknownModel(endpoint) {
  const asked = { model: "gpt-9", messages: [{ role: "user", content: QUESTION }] };
  const error = await errorOf(connect(endpoint).chat.completions.create(asked));
  assert(error instanceof OpenAI.NotFoundError);
  assert.equal(error.code, "model_not_found");
  return error.message;
}

async function errorOfALongPrompt(endpoint) {
  const messages = [{ role: "user", content: "fox ".repeat(5000) }];
  const asked = { model: endpoint.model, messages };
  const error = await errorOf(connect(endpoint).chat.completions.create(asked));
  assert(error instanceof OpenAI.BadRequestError);
  assert.equal(error.code, "context_length_exceeded");
  return error.message;
}

await run(
  models,
  responses,
  responsesStream,
  responsesParse,
  chat,
  chatStream,
  chatParse,
  chatTools,
  chatRunTools,
  completion,
  embeddings,
  errorOfAWrongKey,
  errorOfAnUnknownModel,
  errorOfALongPrompt,
);
