"""``meansparse train``: adversarial training of the ResNet-18 of the ablations. Read ``train`` first."""
