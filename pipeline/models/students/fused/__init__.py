"""The fused inner block of TNT and TITN: C++ on a CPU, Triton on CUDA."""
