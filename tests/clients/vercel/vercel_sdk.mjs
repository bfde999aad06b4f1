// The Vercel AI SDK: whole and streamed, on the OpenAI port and on SageMaker's OpenAI path.

import assert from "node:assert/strict";

import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { APICallError, generateText, streamText } from "ai";

const given = JSON.parse(process.env.LLAVA_CLIENT_TEST);
const [firstQuestion, secondQuestion] = given.questions;
const [firstAnswer, secondAnswer] = given.answers;

const first = [
  {
    role: "user",
    content: [
      { type: "image", image: Buffer.from(given.picture, "base64") },
      { type: "text", text: firstQuestion },
    ],
  },
];
const both = [
  ...first,
  { role: "assistant", content: firstAnswer },
  { role: "user", content: secondQuestion },
];

async function hold(baseURL, apiKey) {
  const provider = createOpenAICompatible({ name: "llava", baseURL, apiKey, includeUsage: true });
  const model = provider("llava");

  assert.equal((await generateText({ model, messages: first })).text, firstAnswer);
  const second = await generateText({ model, messages: both, temperature: 0 });
  assert.equal(second.text, secondAnswer);
  assert.equal(second.finishReason, "stop");
  assert.ok(second.usage.inputTokenDetails.cacheReadTokens > 0);

  const pieces = [];
  const streamed = streamText({ model, messages: both });
  for await (const piece of streamed.textStream) {
    pieces.push(piece);
  }
  assert.equal(pieces.join(""), secondAnswer);
  assert.ok(pieces.length > 2);
  assert.ok((await streamed.usage).outputTokens > 0);

  await assert.rejects(
    generateText({ model, messages: first, presencePenalty: 9, maxRetries: 0 }),
    (error) => APICallError.isInstance(error) && /presence_penalty/.test(error.message),
  );
}

await hold(given.openai_url, "none");
await hold(`${given.runtime_url}/endpoints/${given.endpoint}/openai/v1`, given.token);
