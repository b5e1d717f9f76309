"""A Switch SAE in plain PyTorch: the whole architecture, and a training run of a few seconds on a CPU.

    python examples/minimal_switch.py

Only torch is imported. The package computes the same function (a test compares outputs, loss and gradients in float64),
with sparse kernels in place of the loop over experts. Shapes: B tokens, D d_in, F latents, E experts, M = F / E latents
per expert, K active latents per token. See arXiv 2410.08201.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize


class SwitchSAE(nn.Module):
    """A router sends each activation to one of E small TopK SAEs; the others are not computed for it."""

    def __init__(self, d_in: int, d_sae: int, n_experts: int, k: int, balance: float = 0.3) -> None:
        super().__init__()
        self.n_experts, self.k, self.balance = n_experts, k, balance
        self.width = d_sae // n_experts  # M: expert e owns latents e * M to (e + 1) * M
        self.W_dec = nn.Parameter(normalize(torch.randn(d_sae, d_in), dim=1))  # [F, D], unit rows
        self.W_enc = nn.Parameter(self.W_dec.detach().T.clone())  # [D, F]
        self.W_router = nn.Parameter(torch.randn(d_in, n_experts) / d_in**0.5)  # [D, E]
        self.b_dec = nn.Parameter(torch.zeros(d_in))
        self.b_router = nn.Parameter(torch.zeros(d_in))

    def route(self, x_BD: Tensor) -> Tensor:
        """Probability of each expert, [B, E]."""
        return ((x_BD - self.b_router) @ self.W_router).softmax(dim=1)

    def encode(self, x_BD: Tensor, probs_BE: Tensor) -> tuple[Tensor, Tensor]:
        """Values and indices of the K active latents, [B, K] each. Only the chosen expert's block is multiplied."""
        gate_B, expert_B = probs_BE.max(dim=1)
        values_BK = x_BD.new_zeros(len(x_BD), self.k)
        indices_BK = torch.zeros(len(x_BD), self.k, dtype=torch.int64)
        for e in range(self.n_experts):
            tokens = (expert_B == e).nonzero().flatten()
            block = slice(e * self.width, (e + 1) * self.width)
            z = ((x_BD[tokens] - self.b_dec) @ self.W_enc[:, block]).relu()
            top = z.topk(self.k, dim=1)
            values_BK[tokens] = gate_B[tokens, None] * top.values  # the gate is what trains the router
            indices_BK[tokens] = top.indices + block.start
        return values_BK, indices_BK

    def decode(self, values_BK: Tensor, indices_BK: Tensor) -> Tensor:
        """The sum of K decoder rows per token, [B, D]: 2BDK multiply-adds in place of 2BDF."""
        return torch.einsum("bk,bkd->bd", values_BK, self.W_dec[indices_BK]) + self.b_dec

    def forward(self, x_BD: Tensor) -> Tensor:
        return self.decode(*self.encode(x_BD, self.route(x_BD)))

    def loss(self, x_BD: Tensor) -> tuple[Tensor, Tensor]:
        """Squared error plus load balance, and each expert's share of the batch, [E]."""
        probs_BE = self.route(x_BD)
        error = (self.decode(*self.encode(x_BD, probs_BE)) - x_BD).square().sum(dim=1).mean()
        load_E = probs_BE.argmax(dim=1).bincount(minlength=self.n_experts).to(x_BD.dtype) / len(x_BD)
        # 1 when tokens are spread evenly, E when one expert has them all; the gradient goes through the probabilities.
        balance = self.n_experts * (load_E * probs_BE.mean(dim=0)).sum()
        return error + self.balance * variance(x_BD) * balance, load_E

    @torch.no_grad()
    def project_decoder_gradient(self) -> None:
        """Remove the component of each row's gradient along the row: the norm is fixed, only the direction learns."""
        assert self.W_dec.grad is not None
        self.W_dec.grad -= (self.W_dec.grad * self.W_dec).sum(dim=1, keepdim=True) * self.W_dec

    @torch.no_grad()
    def normalize_decoder(self) -> None:
        self.W_dec.copy_(normalize(self.W_dec, dim=1))


def variance(x_BD: Tensor) -> Tensor:
    return (x_BD - x_BD.mean(dim=0)).square().sum(dim=1).mean()


def activations(n: int, directions_TFD: Tensor) -> Tensor:
    """Each token has one topic T and mixes a few of that topic's directions, [n, D]."""
    topic_n = torch.randint(len(directions_TFD), (n,))
    active_nF = torch.rand(n, directions_TFD.shape[1]) < 4 / directions_TFD.shape[1]
    strength_nF = active_nF * (0.5 + torch.rand(active_nF.shape))
    return torch.einsum("nf,nfd->nd", strength_nF, directions_TFD[topic_n])


def main(steps: int = 500, batch: int = 512) -> float:
    torch.manual_seed(0)
    dictionary = normalize(torch.randn(4, 32, 64), dim=2)  # 4 topics with 32 directions each
    sae = SwitchSAE(d_in=64, d_sae=256, n_experts=4, k=8)
    with torch.no_grad():
        sae.b_dec.copy_(activations(batch, dictionary).mean(dim=0))
        sae.b_router.copy_(sae.b_dec)
    optimizer = torch.optim.Adam(sae.parameters(), lr=5e-3)
    for step in range(1, steps + 1):
        x_BD = activations(batch, dictionary)
        loss, load_E = sae.loss(x_BD)
        loss.backward()
        sae.project_decoder_gradient()
        optimizer.step()
        optimizer.zero_grad()
        sae.normalize_decoder()
        if step % (steps // 5) == 0:
            with torch.no_grad():
                explained = 1 - (sae(x_BD) - x_BD).square().sum(dim=1).mean() / variance(x_BD)
            load = " ".join(f"{share:4.0%}" for share in load_E.tolist())
            print(f"step {step:4}  loss {loss.item():.3f}  explained variance {explained:.3f}  expert load {load}")
    found = (dictionary.flatten(0, 1) @ sae.W_dec.detach().T).amax(dim=1) > 0.9
    print(f"{int(found.sum())} of the {len(found)} true directions are decoder rows (cosine above 0.9)")
    return float(explained)


if __name__ == "__main__":
    main()
