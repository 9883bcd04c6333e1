// SPDX-License-Identifier: Apache-2.0
// transformers.js under Node: `node transformers_js.mjs ARTEFACTS`, started where its node_modules are.
import { createRequire } from 'node:module';
import { readFileSync, writeSync } from 'node:fs';
import { join } from 'node:path';
import { pathToFileURL } from 'node:url';

const require = createRequire(join(process.cwd(), 'package.json'));
const js = await import(pathToFileURL(require.resolve('@huggingface/transformers')));
const folder = process.argv[2];
const inputs = JSON.parse(readFileSync(join(folder, 'inputs.json')));
const pictures = [0, 1, 2, 3].map((number) => join(folder, 'pictures', `own${number}.png`));
const options = { dtype: 'fp32', device: 'cpu' };
js.env.allowRemoteModels = false;
js.env.localModelPath = `${folder}/`;

const normalized = (tensor) => tensor.normalize(2, -1).tolist();
const pixels = async (name) =>
  (await js.AutoProcessor.from_pretrained(name))(await Promise.all(pictures.map((path) => js.RawImage.read(path))));
const tokens = async (name, padding) =>
  (await js.AutoTokenizer.from_pretrained(name))(inputs.texts, { padding, truncation: true });

async function image(name) {
  const model = await js.CLIPVisionModelWithProjection.from_pretrained(name, options);
  return normalized((await model(await pixels(name))).image_embeds);
}

async function text(name, padding) {
  const model = await js.CLIPTextModelWithProjection.from_pretrained(name, options);
  return normalized((await model(await tokens(name, padding))).text_embeds);
}

async function logits(name, way) {
  const model = await js.AutoModel.from_pretrained(name, options);
  const padding = name.endsWith('siglip') ? 'max_length' : true; // as the card says
  return (await model({ ...(await pixels(name)), ...(await tokens(name, padding)) }))[`logits_per_${way}`].tolist();
}

async function scores(name) {
  const classify = await js.pipeline('zero-shot-image-classification', name, options);
  const found = await classify(pictures, inputs.labels, { hypothesis_template: 'This is a photo of {}.' });
  return found.map((row) => inputs.labels.map((label) => row.find((guess) => guess.label === label).score));
}

const rows = [];
for (const artefact of ['web/clip', 'web/siglip', 'onnx/clip', 'onnx/siglip']) {
  const towers = [
    ['image embeddings', 'CLIPVisionModelWithProjection', () => image(artefact)],
    ['text embeddings', 'CLIPTextModelWithProjection', () => text(artefact, true)],
    ['text embeddings', 'CLIPTextModelWithProjection, whole context', () => text(artefact, 'max_length')],
  ];
  const checks = [
    ...(artefact.endsWith('clip') ? towers : []),
    ['logits per image', 'AutoModel', () => logits(artefact, 'image')],
    ['logits per text', 'AutoModel', () => logits(artefact, 'text')],
    ['zero-shot scores', 'pipeline', () => scores(artefact)],
  ];
  for (const [compared, how, compute] of checks) {
    const row = { artefact, compared, how };
    try {
      rows.push({ ...row, found: await compute() });
    } catch (error) {
      console.error(error);
      rows.push({ ...row, error: `${error.name}: ${error.message}` });
    }
  }
}
const versions = { '@huggingface/transformers': js.env.version };
writeSync(1, `${JSON.stringify({ versions, rows })}\n`);
