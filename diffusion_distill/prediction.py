"""One network output, readable in every parameterisation."""

from dataclasses import dataclass

from torch import Tensor

from .errors import reject

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction", "flow_prediction", "edm")


@dataclass(frozen=True)
class Prediction:
    """The pair (x0, eps) that a network output implies at x_t = alpha x0 + sigma eps, all of shape (B, ...).

    alpha and sigma broadcast against x0. No formula assumes alpha^2 + sigma^2 = 1 or alpha + sigma = 1; with v-prediction
    data of standard deviation `sigma_data` the same formula covers DDPM (1), TrigFlow and EDM networks.
    """

    x0: Tensor
    eps: Tensor
    alpha: Tensor
    sigma: Tensor
    sigma_data: float = 1.0

    @property
    def flow(self) -> Tensor:
        """Rectified-flow velocity eps - x0 (arXiv:2209.03003)."""
        return self.eps - self.x0

    @property
    def v(self) -> Tensor:
        """v = alpha eps - sigma x0 (arXiv:2202.00512, app. D), x0 in units of sigma_data."""
        return self.alpha * self.sigma_data * self.eps - self.sigma * self.x0 / self.sigma_data

    @property
    def score(self) -> Tensor:
        """grad log p_t(x_t) = -eps / sigma."""
        return -self.eps / self.sigma

    @classmethod
    def from_output(
        cls, output: Tensor, prediction_type: str, x_t: Tensor, alpha: Tensor, sigma: Tensor, sigma_data: float = 1.0
    ) -> "Prediction":
        """Read `output` (B, ...) of a network of `prediction_type` at x_t (B, ...).

        Raises:
            InputError: for an unknown `prediction_type`.
        """
        if prediction_type == "epsilon":
            x0, eps = (x_t - sigma * output) / alpha, output
        elif prediction_type == "sample":
            x0, eps = output, (x_t - alpha * output) / sigma
        elif prediction_type in ("v_prediction", "edm"):
            v = -output if prediction_type == "edm" else output
            cos, norm = alpha * sigma_data, (alpha * sigma_data) ** 2 + sigma**2
            x0, eps = sigma_data * (cos * x_t - sigma * v) / norm, (sigma * x_t + cos * v) / norm
        elif prediction_type == "flow_prediction":
            x0, eps = (x_t - sigma * output) / (alpha + sigma), (x_t + alpha * output) / (alpha + sigma)
        else:
            raise reject("prediction_type", prediction_type, "accepted: " + ", ".join(PREDICTION_TYPES))
        return cls(x0, eps, alpha, sigma, sigma_data)

    def view(self, prediction_type: str) -> Tensor:
        """Inverse of `from_output`: the tensor that a network of `prediction_type` would have produced."""
        views = {"epsilon": "eps", "sample": "x0", "v_prediction": "v", "edm": "v", "flow_prediction": "flow"}
        value: Tensor = getattr(self, views[prediction_type])
        return -value if prediction_type == "edm" else value

    def interpolate(self, other: "Prediction", weight: float | Tensor) -> "Prediction":
        """self + weight (other - self); weight > 1 extrapolates. Every view is linear in (x0, eps), so all of them follow."""
        x0, eps = (a + weight * (b - a) for a, b in ((self.x0, other.x0), (self.eps, other.eps)))
        return Prediction(x0, eps, self.alpha, self.sigma, self.sigma_data)
