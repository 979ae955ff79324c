// AI SDK for node: text, a stream, an object by its schema and a tool; OpenAI's responses and
// Anthropic's messages through their own providers.
import { generateText, jsonSchema, Output, stepCountIs, streamText, tool } from "ai";
import { createAnthropic } from "@ai-sdk/anthropic";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import assert from "node:assert";

const base = `${process.env.SERVER}/v1`;
const schema = jsonSchema({
  type: "object",
  properties: { city: { enum: ["Oslo", "Rome"] } },
  required: ["city"],
  additionalProperties: false,
});
const compatible = createOpenAICompatible({ name: "qtool", baseURL: base, supportsStructuredOutputs: true });
const models = [
  compatible("tiny"),
  createOpenAI({ baseURL: base, apiKey: "none" })("tiny"),
  createAnthropic({ baseURL: base, apiKey: "none" })("tiny"),
];
for (const model of models) {
  const { text } = await generateText({ model, prompt: "def main():", maxOutputTokens: 16 });
  assert(text.length > 0);
  let streamed = "";
  for await (const piece of streamText({ model, prompt: "def main():", maxOutputTokens: 16 }).textStream) streamed += piece;
  assert(streamed.length > 0);
  let asked = 0;
  await generateText({
    model,
    prompt: "How is the weather?",
    tools: { weather: tool({ description: "Tells the weather.", inputSchema: schema, execute: () => { asked += 1; return "rain"; } }) },
    toolChoice: "required",
    stopWhen: stepCountIs(2),
    maxOutputTokens: 2000,
  });
  assert(asked >= 1);
}
const { output } = await generateText({
  model: models[0],
  prompt: "Where does it rain?",
  output: Output.object({ schema }),
  maxOutputTokens: 2000,
});
assert(["Oslo", "Rome"].includes(output.city));
