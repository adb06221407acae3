/* What a C program with an installed onepass does. */
#include <onepass/onepass_c.h>
#include <stdio.h>
#include <string.h>

int main(void) {
  float q[4] = {1, 0, 0, 1}, out[4];
  onepass_tensor tensor = ONEPASS_TENSOR_INIT, tout;
  onepass_attention_outputs outputs = ONEPASS_ATTENTION_OUTPUTS_INIT;
  tensor.data = q;
  tensor.rank = 4;
  for (int i = 0; i < 4; ++i) {
    tensor.shape[i] = i < 2 ? 1 : 2;
    tensor.strides[i] = i == 3 ? 1 : i == 2 ? 2 : 4;
  }
  tout = tensor;
  tout.data = out;
  outputs.out = &tout;
  if (onepass_attention(&tensor, &tensor, &tensor, &outputs, NULL, NULL) != ONEPASS_OK) {
    printf("%s\n", onepass_last_error());
    return 1;
  }
  if (!(out[0] > 0.66f && out[0] < 0.68f && out[0] + out[1] > 0.999f && out[0] + out[1] < 1.001f)) return 1;
  if (onepass_attention(&tensor, NULL, &tensor, &outputs, NULL, NULL) != ONEPASS_INVALID_ARGUMENT) return 1;
  return strstr(onepass_last_error(), "attention: k: got a null pointer") == NULL;
}
