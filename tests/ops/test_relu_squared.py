import torch.nn.functional as F
from activation_cases import ActivationTests


class TestReLUSquared(ActivationTests):
    op = "relu_squared"

    @staticmethod
    def eager(z):
        return F.relu(z).square()
