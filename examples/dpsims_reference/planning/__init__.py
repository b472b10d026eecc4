"""What a training run needs, predicted without a GPU: counted on fake tensors, then arithmetic."""

from dpsims_reference.planning.counts import (
    StepCounts as StepCounts,
    count_step as count_step,
    count_steps as count_steps,
)
from dpsims_reference.planning.estimate import (
    Estimate as Estimate,
    estimate as estimate,
)
from dpsims_reference.planning.hardware import (
    GPUS as GPUS,
    Cluster as Cluster,
    Gpu as Gpu,
)
from dpsims_reference.planning.report import (
    comparison_rst as comparison_rst,
    format_plans as format_plans,
    plan_runs as plan_runs,
)
