"""What generator and student minimize, one equation a function, as in ``docs/method.md``, section 5.

Logits of teacher and student are (N, K) throughout, labels (N,).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from granq.fast import channel_var_mean
from granq.quantizer import at_least_float32


def disagreement_loss(teacher: Tensor, student: Tensor, labels: Tensor) -> Tensor:
    """CE(t - s, y): images on which only the teacher knows the label."""
    return F.cross_entropy(teacher - student, labels)


def agreement_loss(teacher: Tensor, student: Tensor, labels: Tensor) -> Tensor:
    """CE(t + s, y): images on which both know it."""
    return F.cross_entropy(teacher + student, labels)


def entropy(logits: Tensor) -> Tensor:
    """Shannon entropy in nats of softmax(logits), (N, K) -> (N,)."""
    log_p = F.log_softmax(logits, 1)
    return -(log_p.exp() * log_p).sum(1)


def margin_loss(teacher: Tensor, student: Tensor, low: float, high: float) -> Tensor:
    """Keep the normalized entropy of the difference between ``low`` and ``high`` (AdaDFQ)."""
    h = entropy(teacher - student)
    h = (h - h.min()) / (math.log(teacher.shape[1]) - h.min()).clamp_min(1e-12)
    return F.relu(low - h).mean() + F.relu(h - high).mean()


def student_loss(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    """-T^2 mean H(softmax((t - s) / T)): maximal entropy means logits equal up to a constant."""
    return -(temperature**2) * entropy((teacher - student) / temperature).mean()


def soft_label_loss(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    """T^2 KL(softmax(t / T) || softmax(s / T)) (Hinton et al. 2015)."""
    t, s = (F.log_softmax(logits / temperature, 1) for logits in (teacher, student))
    return temperature**2 * F.kl_div(s, t, log_target=True, reduction="batchmean")


def gdfq_student_loss(teacher: Tensor, student: Tensor, labels: Tensor) -> Tensor:
    """CE(s, y) + KL(teacher || student) (GDFQ, Xu et al. 2020)."""
    return F.cross_entropy(student, labels) + soft_label_loss(teacher, student, 1.0)


def layer_loss(teacher: Sequence[Tensor], student: Sequence[Tensor], ceilings: Sequence[float | None]) -> Tensor:
    """Mean over layers of the squared difference over the teacher's variance within channels (as FitNets, BRECQ).

    Both are outputs of BatchNorms (N, C, H, W), the teacher's without gradients. What a ReLU after one cuts off both
    (``ceilings``) is no difference. The variance is at least a thousandth of the layers' mean: a layer that is nearly
    constant hardly matters.
    """
    errors, variances = [], []
    for t, s, ceiling in zip(teacher, student, ceilings, strict=True):
        if ceiling is not None:
            t, s = (F.relu(x) if ceiling == math.inf else x.clamp(0, ceiling) for x in (t, s))  # relu is faster
        t, s = at_least_float32(t), at_least_float32(s)
        difference = s - t  # times a constant it has half the gradient of its square; that of F.mse_loss is slow
        errors.append((difference.detach() * difference).sum() / t.numel())
        variances.append(channel_var_mean(t)[0].mean())
    variance = torch.stack(variances)
    loss = (torch.stack(errors) / variance.clamp_min(1e-3 * variance.mean())).mean()
    return 2 * loss - loss.detach()
