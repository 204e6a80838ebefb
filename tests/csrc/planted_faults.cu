// One fault for each of compute-sanitizer's tools, chosen by name: proof that test_sanitizer.py would see it.
#include <cstring>

__global__ void beyond_the_end(float* data) { data[64 + threadIdx.x] = 0.0f; }

__global__ void read_before_written(float* data) {
  if (data[threadIdx.x] > 1.0f) data[threadIdx.x] = 1.0f;
}

__global__ void no_barrier(float* data) {
  __shared__ float shared[64];
  shared[threadIdx.x] = static_cast<float>(threadIdx.x);
  data[threadIdx.x] = shared[63 - threadIdx.x];
}

int main(int, char** argv) {
  float* data = nullptr;
  if (cudaMalloc(&data, 64 * sizeof(float)) != cudaSuccess) return 2;
  if (!std::strcmp(argv[1], "memcheck")) beyond_the_end<<<1, 64>>>(data);
  if (!std::strcmp(argv[1], "initcheck")) read_before_written<<<1, 64>>>(data);
  if (!std::strcmp(argv[1], "racecheck")) no_barrier<<<1, 64>>>(data);
  return cudaDeviceSynchronize() == cudaSuccess ? 0 : 2;
}
