# SPDX-License-Identifier: Apache-2.0
"""Control: a misspelt name or attribute and a wrong argument are errors, so the results are not `Any`."""

import ckpttools as ct
import remattools as rt

ct.verfiy("runs/exp1")  # error
rt.aply(None, {})  # error
print(ct.verify("runs/exp1").steps[0].leafs)  # error
ct.CheckpointSpec(directory="runs/exp1", save=500)  # error
print(rt.measure(len, "x").temp_bites)  # error
rt.Remat(3)  # error
rt.Remat(save="attn.qkv")  # error
rt.Remat("dots_saveable").policy.lower()  # error
