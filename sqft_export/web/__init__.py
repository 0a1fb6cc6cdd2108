"""Static web sites that run a deployment in the browser with Transformers.js.

static_page  the page and its settings next to a model folder
site         the site of a run or deployment
library      Transformers.js and ONNX Runtime Web, from the npm registry
server       the local preview
"""
