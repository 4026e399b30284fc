"""What a trained model is asked beyond its loss: experiments that put the parts below together."""
