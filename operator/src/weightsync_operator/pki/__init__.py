"""The certificate that agents check the operator by: an authority of its own, or files that somebody else keeps."""
