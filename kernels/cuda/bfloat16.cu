#include "launch.cuh"

namespace lite_detr::cuda {

LITE_DETR_INSTANCES(BFloat16)

}  // namespace lite_detr::cuda
