"""A policy of one's own: an unsure base model hands over, but only to a model that is surer.

    multicolm generate tiny "What is Dulerex made from?" \
        --policy examples/own_policy/surer.py:Surer --set threshold=0.8 --trace
"""

import torch

import multicolm


@multicolm.register_policy("surer")
class Surer(multicolm.SelectPolicy):
    threshold: float = 0.5  # fields are the policy's params, checked when it is made

    base_signals = frozenset({"top1"})  # what it looks at: of the base model everywhere,
    assistant_signals = frozenset({"top1"})  # of the assistants
    assistants = "deferred"  # only where `defers` says so

    def defers(self, views: multicolm.Views) -> torch.Tensor:
        return views.base.top1_probs < self.threshold

    def select(self, views: multicolm.Views) -> torch.Tensor:
        return views.stack(lambda view: view.top1_probs).argmax(0)  # ties: the lower index
