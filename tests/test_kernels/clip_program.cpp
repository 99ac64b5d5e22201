// The kernels that clip gradients on fibers, launched as csrc/clip.cu launches them on a GPU.
//
//     program LIMIT SEED OFFSET SIZE... < gradients, floats > the norm of all and the clipped gradients, floats
//
// Every gradient begins OFFSET floats behind a multiple of 16 bytes, in an allocation of its own, so that sanitizers see
// an access beyond its ends.

#include "fibers.h"

#include <cstdio>
#include <cstdlib>
#include <limits>
#include <vector>

#include "clip_device.cuh"

using namespace bincomm;

int main(int count, char** arguments) {
  const double limit = std::atof(arguments[1]);
  unsigned seed = std::atoi(arguments[2]);
  const int offset = std::atoi(arguments[3]);
  std::vector<std::vector<float>> gradients;
  std::vector<Gradients> launches;
  int parts = 0;
  for (int a = 4; a < count; ++a) {
    const int size = std::atoi(arguments[a]);
    auto& gradient = gradients.emplace_back(offset + size);
    if (std::fread(gradient.data() + offset, sizeof(float), size, stdin) != static_cast<size_t>(size)) std::abort();
    if (launches.empty() || launches.back().count == kGradients) launches.emplace_back(Gradients{});
    Gradients& launch = launches.back();
    launch.data[launch.count] = gradient.data() + offset;
    launch.size[launch.count] = size;
    const int own = (size + kPart - 1) / kPart;
    launch.first[launch.count + 1] = launch.first[launch.count] + own;
    ++launch.count;
    parts += own;
  }
  std::vector<double> sums(parts, std::numeric_limits<double>::quiet_NaN());
  float norm = std::numeric_limits<float>::quiet_NaN();
  double* own = sums.data();
  for (const Gradients& launch : launches) {
    fibers::launch(launch.first[launch.count], kClipThreads, 1, kClipBytes, seed++,
                   [&] { clip_sums_kernel(launch, own); });
    own += launch.first[launch.count];
  }
  own = sums.data();
  for (const Gradients& launch : launches) {
    const TotalNorm total{sums.data(), parts, &launch == &launches.back() ? &norm : nullptr};
    fibers::launch(launch.first[launch.count], kClipThreads, 1, kClipBytes, seed++,
                   [&] { clip_scale_kernel(launch, own, limit, total); });
    own += launch.first[launch.count];
  }
  std::fwrite(&norm, sizeof norm, 1, stdout);
  for (const auto& gradient : gradients) {
    std::fwrite(gradient.data() + offset, sizeof(float), gradient.size() - offset, stdout);
  }
}
