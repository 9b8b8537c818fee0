// The operators' namespace, in each library its own.
extern "C" const char* lite_detr_harness_namespace() { return LITE_DETR_HARNESS_NAMESPACE; }
