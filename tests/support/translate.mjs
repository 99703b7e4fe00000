// Translates WGSL with naga: node translate.mjs PACKAGE < {"metal": [TEXT, …], "hlsl": [TEXT, …]}
// Prints the index, the format and the message of each that it refuses, as JSON.
import fs from "node:fs";
import path from "node:path";
import { pathToFileURL } from "node:url";

const folder = path.resolve(process.argv[2]);
const glue = await import(pathToFileURL(path.join(folder, "wgsl_wasm_transpiler_bg.js")));
const module = fs.readFileSync(path.join(folder, "wgsl_wasm_transpiler_bg.wasm"));
const { instance } = await WebAssembly.instantiate(module, { "./wgsl_wasm_transpiler_bg.js": glue });
glue.__wbg_set_wasm(instance.exports);
instance.exports.__wbindgen_start();
glue.init();

const refused = [];
for (const [format, texts] of Object.entries(JSON.parse(fs.readFileSync(0)))) {
  for (const [index, text] of texts.entries()) {
    try {
      if (!/void main/.test(glue.compileShader(text, format))) throw new Error("it lacks main");
    } catch (error) {
      refused.push([index, format, String(error)]);
    }
  }
}
process.stdout.write(JSON.stringify(refused));
