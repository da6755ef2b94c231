// The AI SDK (https://ai-sdk.dev) with its providers for OpenAI and for compatible servers.

import assert from "node:assert/strict";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { APICallError, Output, embed, embedMany, generateText, isStepCount, streamText, tool } from "ai";
import { z } from "zod";
import { QUESTION, errorOf, joined, run } from "./steps.mjs";

const Trip = z.object({ city: z.enum(["Paris", "Rome"]), days: z.number().int().min(1).max(9) });

const TOOLS = {
  getWeather: tool({
    description: "Get the weather of a city.",
    inputSchema: z.object({ city: z.enum(["Paris", "Rome"]) }),
    execute: async ({ city }) => `sunny in ${city}`,
  }),
};

const openaiProvider = (endpoint) =>
  createOpenAI({ baseURL: endpoint.url, apiKey: endpoint.key });

const compatibleProvider = (endpoint) =>
  createOpenAICompatible({
    name: "raytune",
    baseURL: endpoint.url,
    apiKey: endpoint.key,
    includeUsage: true,
    supportsStructuredOutputs: true,
  });

async function text(model) {
  const { text, usage } = await generateText({ model, system: "Be brief.", prompt: QUESTION });
  assert(usage.outputTokens > 0);
  return text;
}

async function stream(model) {
  const result = streamText({ model, prompt: QUESTION, maxOutputTokens: 20 });
  const parts = [];
  for await (const part of result.textStream) parts.push(part);
  assert((await result.usage).outputTokens > 0);
  return joined(parts);
}

async function object(model) {
  const { output } = await generateText({
    model,
    output: Output.object({ schema: Trip }),
    prompt: QUESTION,
  });
  return Trip.parse(output);
}

// Two requests: a call, which the SDK executes, then what the model says to its result.
async function tools(model) {
  const { steps } = await generateText({
    model,
    tools: TOOLS,
    toolChoice: "required",
    stopWhen: isStepCount(2),
    providerOptions: ONE_CALL,
    prompt: QUESTION,
  });
  assert.equal(steps.length, 2);
  assert.match(steps[0].toolResults[0].output, /^sunny in (Paris|Rome)$/);
  return steps[0].toolCalls[0].input;
}

async function toolsStream(model) {
  const result = streamText({
    model,
    tools: TOOLS,
    toolChoice: { type: "tool", toolName: "getWeather" },
    prompt: QUESTION,
  });
  const [call] = await result.toolCalls;
  assert.match(call.input.city, /^(Paris|Rome)$/);
  return call.input;
}

// A model of random weights might call without end.
const ONE_CALL = {
  openai: { parallelToolCalls: false },
  raytune: { parallel_tool_calls: false },
};

// Function names are the steps' names.
const openaiText = (endpoint) => text(openaiProvider(endpoint)(endpoint.model));
const openaiStream = (endpoint) => stream(openaiProvider(endpoint)(endpoint.model));
const openaiObject = (endpoint) => object(openaiProvider(endpoint)(endpoint.model));
const openaiTools = (endpoint) => tools(openaiProvider(endpoint)(endpoint.model));
const openaiToolsStream = (endpoint) => toolsStream(openaiProvider(endpoint)(endpoint.model));
const openaiChatText = (endpoint) => text(openaiProvider(endpoint).chat(endpoint.model));
const openaiChatStream = (endpoint) => stream(openaiProvider(endpoint).chat(endpoint.model));
const openaiChatObject = (endpoint) => object(openaiProvider(endpoint).chat(endpoint.model));
const openaiChatTools = (endpoint) => tools(openaiProvider(endpoint).chat(endpoint.model));
const openaiChatToolsStream = (endpoint) =>
  toolsStream(openaiProvider(endpoint).chat(endpoint.model));
const compatibleText = (endpoint) => text(compatibleProvider(endpoint)(endpoint.model));
const compatibleStream = (endpoint) => stream(compatibleProvider(endpoint)(endpoint.model));
const compatibleObject = (endpoint) => object(compatibleProvider(endpoint)(endpoint.model));
const compatibleTools = (endpoint) => tools(compatibleProvider(endpoint)(endpoint.model));

const compatibleToolsStream = (endpoint) =>
  toolsStream(compatibleProvider(endpoint)(endpoint.model));

async function openaiCompletion(endpoint) {
  const model = openaiProvider(endpoint).completion(endpoint.model);
  const { text } = await generateText({ model, prompt: QUESTION, maxOutputTokens: 12 });
  return text;
}

async function compatibleCompletion(endpoint) {
  const model = compatibleProvider(endpoint).completionModel(endpoint.model);
  const { text } = await generateText({ model, prompt: QUESTION, maxOutputTokens: 12 });
  return text;
}

async function openaiEmbeddings(endpoint) {
  const model = openaiProvider(endpoint).embedding(endpoint.model);
  const { embedding } = await embed({ model, value: QUESTION });
  return embedding.length;
}

async function compatibleEmbeddings(endpoint) {
  const model = compatibleProvider(endpoint).embeddingModel(endpoint.model);
  const { embeddings } = await embedMany({ model, values: [QUESTION, "Rome"] });
  assert.equal(embeddings.length, 2);
  return embeddings[0].length;
}

async function errorOfAnUnknownModel(endpoint) {
  const model = compatibleProvider(endpoint)("gpt-9");
  const error = await errorOf(generateText({ model, prompt: QUESTION, maxRetries: 0 }));
  assert(APICallError.isInstance(error));
  assert.equal(error.statusCode, 404);
  return error.message;
}

async function errorOfAWrongKey(endpoint) {
  const model = openaiProvider({ ...endpoint, key: "sk-wrong" })(endpoint.model);
  const error = await errorOf(generateText({ model, prompt: QUESTION, maxRetries: 0 }));
  assert(APICallError.isInstance(error));
  assert.equal(error.statusCode, 401);
  return error.message;
}

await run(
  openaiText,
  openaiStream,
  openaiObject,
  openaiTools,
  openaiToolsStream,
  openaiChatText,
  openaiChatStream,
  openaiChatObject,
  openaiChatTools,
  openaiChatToolsStream,
  openaiCompletion,
  openaiEmbeddings,
  compatibleText,
  compatibleStream,
  compatibleObject,
  compatibleTools,
  compatibleToolsStream,
  compatibleCompletion,
  compatibleEmbeddings,
  errorOfAnUnknownModel,
  errorOfAWrongKey,
);
