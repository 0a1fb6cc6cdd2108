"""Load a folder in vLLM and answer prompts: ``vllm_answers.py <job.json> <result.json>``."""

import json
import sys
from pathlib import Path


def linears(model) -> dict[str, list[str]]:
    """Names of quantized Linears with their kernels, and of the others."""
    found = {"linears": {}, "plain": []}
    for name, module in model.named_modules():
        method = getattr(module, "quant_method", None)
        if method is None or "Embedding" in type(module).__name__:
            continue
        if hasattr(module, "qweight"):
            kernel = getattr(method, "kernel", method)
            found["linears"][name] = type(kernel).__name__
        else:
            found["plain"].append(name)
    return found


def main() -> None:
    from vllm import LLM, SamplingParams, TokensPrompt

    job_file, result_file = map(Path, sys.argv[1:])
    job = json.loads(job_file.read_text())
    llm = LLM(model=job["folder"], enforce_eager=True, max_logprobs=-1)
    config = llm.llm_engine.vllm_config
    (modules,) = llm.apply_model(linears)
    answers = []
    for prompt in job["prompts"]:
        params = SamplingParams(
            temperature=0, max_tokens=prompt["new_tokens"], logprobs=-1, ignore_eos=True
        )
        (answer,) = llm.generate([TokensPrompt(prompt_token_ids=prompt["ids"])], params)
        (out,) = answer.outputs
        rows = [[step[token].logprob for token in sorted(step)] for step in out.logprobs]
        answers.append({"tokens": list(out.token_ids), "log_probabilities": rows})
    result = {
        "method": config.model_config.quantization,
        "dtype": str(config.model_config.dtype),
        "config": dict(config.quant_config.full_config),
        **modules,
        "answers": answers,
    }
    result_file.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
