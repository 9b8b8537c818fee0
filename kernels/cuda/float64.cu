#include "launch.cuh"

namespace lite_detr::cuda {

LITE_DETR_INSTANCES(double)

}  // namespace lite_detr::cuda
