"""Reading only a part of the parameters: which chunks, and how far that may move an angle."""
