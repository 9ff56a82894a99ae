// transformers.js under Node.js, from the node_modules of the working directory.
//
// node transformers_js_client.mjs FOLDER DTYPE < texts.json

import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { basename, dirname, join } from "node:path";

const { env, pipeline } = createRequire(join(process.cwd(), "here.js"))("@huggingface/transformers");

const [folder, dtype] = process.argv.slice(2);
env.allowRemoteModels = false;
env.localModelPath = dirname(folder);

const classify = await pipeline("text-classification", basename(folder), { dtype });
const predictions = [];
for (const text of JSON.parse(readFileSync(0, "utf8"))) {
  predictions.push((await classify(text))[0]);
}
console.log(JSON.stringify(predictions));
