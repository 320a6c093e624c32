// node validate.js FILE...: what the Khronos validator says of glTF files, a line of JSON each.
const fs = require("fs");
const validator = require(process.env.LRM_NODE_MODULES + "/gltf-validator");

(async () => {
  for (const file of process.argv.slice(2)) {
    const report = await validator.validateBytes(new Uint8Array(fs.readFileSync(file)));
    console.log(JSON.stringify(report));
  }
})();
