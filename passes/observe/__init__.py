"""What operators read and give while samples run through a graph, with bounded memory."""
