"""Attention over tokens, and the injection of few tokens into a feature map."""

from dpsims.ops.attention.api import (
    attention as attention,
    resolve_attention_impl as resolve_attention_impl,
)
from dpsims.ops.attention.folding import (
    FoldedTokens as FoldedTokens,
    FoldedWeights as FoldedWeights,
    fold_injector_weights as fold_injector_weights,
    fold_tokens as fold_tokens,
    project_tokens as project_tokens,
)
from dpsims.ops.attention.injection import (
    inject_tokens as inject_tokens,
    resolve_injection_impl as resolve_injection_impl,
    resolve_injector_impl as resolve_injector_impl,
)
