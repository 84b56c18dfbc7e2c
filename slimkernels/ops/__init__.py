"""What the ops are: reference, public function, argument checks, autograd Function, fakes."""
