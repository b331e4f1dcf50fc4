// Ask the agent-loop service, show the answer as it is written, and say that it was good.
//
//     AGENTLOOP_TOKEN=al_… node dist/main.js --server 127.0.0.1:50051 "Write a haiku about rivers."
//
// The types under gen/ are generated from the protos; the protos themselves are loaded as the program starts.

import { fileURLToPath } from "node:url";
import { parseArgs } from "node:util";

import * as grpc from "@grpc/grpc-js";
import * as loader from "@grpc/proto-loader";

import type { FeedbackServiceClient } from "./gen/agentloop/v1/FeedbackService.js";
import type { InferenceServiceClient } from "./gen/agentloop/v1/InferenceService.js";
import type { ProtoGrpcType as Feedback } from "./gen/feedback.js";
import type { ProtoGrpcType as Inference } from "./gen/inference.js";

const protos = fileURLToPath(new URL("../../../protos", import.meta.url));

const { values: options, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    server: { type: "string", default: "127.0.0.1:50051" },
    tls: { type: "boolean", default: false },
    "max-tokens": { type: "string", default: "64" },
    timeout: { type: "string", default: "60" },
  },
});

/** Streams one answer to stdout; resolves to the inference's id, which feedback names. */
async function ask(client: InferenceServiceClient, prompt: string, call: () => Call): Promise<string> {
  let inference = "";
  const [metadata, limits] = call();
  const stream = client.Chat(
    {
      alias: "default",
      messages: [{ role: "ROLE_USER", content: prompt }],
      sampling: { maxTokens: Number(options["max-tokens"]), temperature: 0 },
    },
    metadata,
    limits,
  );
  for await (const response of stream) {
    switch (response.event) {
      case "started":
        inference = response.started.inferenceId;
        console.error(`inference ${inference} by ${response.started.modelVersion}`);
        break;
      case "textDelta":
        process.stdout.write(response.textDelta.text);
        break;
      case "completed":
        process.stdout.write("\n");
        console.error(`${response.completed.usage?.outputTokens} tokens written`);
    }
  }
  return inference;
}

type Call = [grpc.Metadata, grpc.CallOptions];

async function main(prompt: string): Promise<void> {
  const loaded = loader.loadSync(["agentloop/v1/inference.proto", "agentloop/v1/feedback.proto"], {
    includeDirs: [protos],
    enums: String,
    longs: Number,
    defaults: true,
    oneofs: true,
  });
  const { agentloop } = grpc.loadPackageDefinition(loaded) as unknown as Inference & Feedback;
  const transport = options.tls ? grpc.credentials.createSsl() : grpc.credentials.createInsecure();
  // A deadline travels with the call: the server stops the engine when it has passed, or when we cancel.
  const call = (): Call => {
    const metadata = new grpc.Metadata();
    metadata.set("authorization", `Bearer ${process.env.AGENTLOOP_TOKEN ?? ""}`);
    return [metadata, { deadline: Date.now() + Number(options.timeout) * 1000 }];
  };
  const inferences: InferenceServiceClient = new agentloop.v1.InferenceService(options.server, transport);
  const feedback: FeedbackServiceClient = new agentloop.v1.FeedbackService(options.server, transport);
  try {
    const inferenceId = await ask(inferences, prompt, call);
    const [metadata, limits] = call();
    await new Promise<void>((resolve, reject) => {
      feedback.Submit({ inferenceId, boolean: true }, metadata, limits, (error) =>
        error ? reject(error) : resolve(),
      );
    });
  } finally {
    inferences.close();
    feedback.close();
  }
}

if (positionals.length !== 1) {
  console.error("give one prompt");
  process.exit(2);
}
try {
  await main(positionals[0]!);
} catch (error) {
  const { code, details } = error as grpc.ServiceError;
  console.error(code === undefined ? String(error) : `${grpc.status[code]}: ${details}`);
  process.exitCode = 1;
}
