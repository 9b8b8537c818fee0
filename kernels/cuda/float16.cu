#include "launch.cuh"

namespace lite_detr::cuda {

LITE_DETR_INSTANCES(Float16)

}  // namespace lite_detr::cuda
