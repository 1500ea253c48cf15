// What the AI SDK of Vercel gets from the server whose base URL is in BASE: one JSON object. test_vercel.py reads it.
import { createOpenAICompatible } from '@ai-sdk/openai-compatible';
import { generateObject, generateText, Output, streamObject, streamText, tool } from 'ai';
import { z } from 'zod';

const name = 'infinity-stories';
const moedial = createOpenAICompatible({
  name: 'moedial',
  baseURL: process.env.BASE,
  apiKey: 'unused',
  includeUsage: true,
  supportsStructuredOutputs: true,
});
const asked = (extra) => ({
  model: moedial(name),
  prompt: 'Tell me a story.',
  temperature: 0,
  seed: 1,
  maxRetries: 0,
  maxOutputTokens: 12,
  providerOptions: { moedial: { num_experts: 2, parallel_tool_calls: false } },
  ...extra,
});
const said = async (answer) => ({
  text: await answer.text,
  usage: (await answer.usage).raw,
  reason: await answer.finishReason,
  calls: (await answer.toolCalls).map(({ toolName, input }) => ({ toolName, input })),
  results: (await answer.toolResults).map(({ output }) => output),
});
const streamed = async (options) => {
  const answer = streamText(options);
  await answer.consumeStream();
  return said(answer);
};
const last = async (stream) => {
  let found;
  for await (const part of stream) found = part;
  return found;
};

const animal = z.enum(['cat', 'dog', 'bird']);
const draw = tool({
  description: 'Draw an animal.',
  inputSchema: z.object({ animal }),
  execute: async ({ animal }) => `A ${animal}.`,
});
const calling = (toolChoice) => asked({ maxOutputTokens: 60, tools: { draw }, toolChoice });
const schema = z.object({ title: z.string().max(20), animals: z.array(animal).min(1).max(3), happy: z.boolean() });
const shaped = asked({ maxOutputTokens: 120, schema });

const found = {
  whole: await said(await generateText(asked())),
  streamed: await streamed(asked()),
  alias: await said(await generateText(asked({ model: moedial(`${name}@k2`), providerOptions: {} }))),
  completion: await said(await generateText(asked({ model: moedial.completionModel(`${name}@k2`), providerOptions: {} }))),
  called: await said(await generateText(calling('required'))),
  calledStreamed: await streamed(calling({ type: 'tool', toolName: 'draw' })),
  object: (await generateObject(shaped)).object,
  objectStreamed: await last(streamObject(shaped).partialObjectStream),
  output: (await generateText(asked({ maxOutputTokens: 120, output: Output.object({ schema }) }))).output,
  refusal: await generateText(asked({ providerOptions: { moedial: { num_experts: 99 } } })).catch((error) => error.message),
};
console.log(JSON.stringify(found));
