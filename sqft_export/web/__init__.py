"""Static web sites that run an ONNX deployment in the browser with Transformers.js.

site     the site's folder: page, model folder, library
graph    the graph with its external data under the names that Transformers.js expects
library  Transformers.js and ONNX Runtime Web, from the npm registry
server   the local preview
"""
