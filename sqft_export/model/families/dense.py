"""Dense models with Llama's names and other norms, scales, rotations or windows."""

from dataclasses import replace

from sqft_export.model.families.llama import LLAMA

PLAIN = replace(LLAMA, builder=None)
FAMILIES = (
    # Every fourth layer has no rotation, for which the builder lacks position ids.
    replace(PLAIN, model_types=("smollm3",), tied=True),
    # Multipliers of embedding, attention, residuals and logits.
    replace(LLAMA, model_types=("granite",), builder="GraniteModel", builder_ropes=("default",)),
    # The same, as Granite 4 without experts and recurrent layers; one Linear for gate and up.
    replace(
        PLAIN,
        model_types=("granitemoehybrid",),
        targets=("q_proj", "k_proj", "v_proj", "output_linear"),
        openvino_config="granite",
    ),
    # Norms after attention and MLP instead of before them; norms of all queries and keys.
    replace(PLAIN, model_types=("olmo2",)),
    replace(PLAIN, model_types=("olmo3",), openvino_config="olmo2"),
    # Attention and MLP read the same norm; windowed layers rotate, the others do not.
    replace(PLAIN, model_types=("cohere2",), tied=True),
    # Norms before and after attention and MLP; one Linear for gate and up.
    replace(PLAIN, model_types=("glm4",), targets=("q_proj", "k_proj", "v_proj", "down_proj")),
    replace(PLAIN, model_types=("stablelm",)),
    # Norms of queries and keys after the rotation.
    replace(
        LLAMA,
        model_types=("hunyuan_v1_dense",),
        builder="HunyuanDenseV1Model",
        builder_ropes=("default",),
    ),
    replace(PLAIN, model_types=("exaone4",), openvino_config="olmo2"),
    replace(
        PLAIN,
        model_types=("phi",),
        targets=("q_proj", "k_proj", "v_proj", "fc1", "fc2"),
        openvino_config="olmo2",
    ),
    # Queries grow with the logarithm of the position, beyond the length of the first training.
    replace(PLAIN, model_types=("ministral3",), openvino_config="olmo2"),
    replace(
        PLAIN,
        model_types=("starcoder2",),
        targets=("q_proj", "k_proj", "v_proj", "c_fc", "c_proj"),
        tied=True,
    ),
)
