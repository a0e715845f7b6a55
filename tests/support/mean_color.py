"""Define an encoder of each patch's mean colour, and a row of `ENCODERS` for it, which the package does not have."""

from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from visualrwkv_hf.encoders import IMAGENET, Encoder


class MeanColorConfig(PreTrainedConfig):
    """Configures an encoder that maps each patch's mean colour to `width` channels by one matrix."""

    model_type = "test_mean_color"
    image_size: int = 28
    patch_size: int = 14
    num_channels: int = 3
    width: int = 8
    num_hidden_layers: int = 1


class MeanColorModel(PreTrainedModel):
    config_class = MeanColorConfig
    main_input_name = "pixel_values"

    def __init__(self, config):
        super().__init__(config)
        self.pool = nn.AvgPool2d(config.patch_size)
        self.proj = nn.Linear(config.num_channels, config.width)
        self.unused = nn.Linear(2, 2)
        self.post_init()

    def get_input_embeddings(self):
        return self.proj

    def forward(self, pixel_values, **kwargs):
        hidden = self.proj(self.pool(pixel_values).flatten(2).transpose(1, 2))
        return BaseModelOutput(last_hidden_state=hidden)


def cut(model, feature_layer):
    del model.unused


ROW = Encoder(
    model_type=MeanColorConfig.model_type,
    model_class=lambda: MeanColorModel,
    statistics=IMAGENET,
    cut=cut,
    read=lambda hidden, config, class_token: hidden,
    width=lambda config: config.width,
    has_feature_layer=False,
)
AutoConfig.register(MeanColorConfig.model_type, MeanColorConfig, exist_ok=True)
