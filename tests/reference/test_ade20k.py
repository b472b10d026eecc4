"""ADE20K's ids, names and colours."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support import assert_equal

from dpsims.errors import InputError
from dpsims_reference.data.ade20k import ade20k_spec


def test_file_ids_are_class_ids():
    spec = ade20k_spec()
    ids = torch.arange(151, dtype=torch.uint8)
    assert_equal(spec.map_ids(ids), ids)
    for unknown in (151, 255):
        with pytest.raises(InputError, match=str(unknown)):
            spec.map_ids(np.array([[unknown]]))


def test_names_and_colours_of_the_challenge():
    spec = ade20k_spec()
    # the challenge's table, some rows of it
    known = {
        0: ("other", (0, 0, 0)),
        1: ("wall", (120, 120, 120)),
        3: ("sky", (6, 230, 230)),
        5: ("tree", (4, 200, 3)),
        13: ("person", (150, 5, 61)),
        21: ("car", (0, 102, 200)),
        127: ("animal", (255, 0, 122)),
        150: ("flag", (92, 0, 255)),
    }
    for class_id, (name, colour) in known.items():
        assert (spec.names[class_id], spec.palette[class_id]) == (name, colour)
