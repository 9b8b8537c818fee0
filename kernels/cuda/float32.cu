#include "launch.cuh"

namespace lite_detr::cuda {

LITE_DETR_INSTANCES(float)

}  // namespace lite_detr::cuda
