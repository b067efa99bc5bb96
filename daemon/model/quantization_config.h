/*
 * A quantised checkpoint's quantization_config, read and validated.
 *
 * Owns the wording of every method: which keys say how codes, scales and zero points are kept, and
 * which variants this daemon refuses, by name. Which single weights are quantised is not read here:
 * the tensors of the files tell (stored_codes.h).
 *
 * Sources: Transformers' AwqConfig, GPTQConfig, BitsAndBytesConfig, CompressedTensorsConfig and
 * FineGrainedFP8Config; compressed-tensors' QuantizationArgs.
 */
#ifndef INTERNVLD_MODEL_QUANTIZATION_CONFIG_H
#define INTERNVLD_MODEL_QUANTIZATION_CONFIG_H

#include "daemon/model/config_reader.h"
#include "daemon/model/quantization.h"

/* `root` is config.json; looked for there, then in text_config and llm_config, under
 * quantization_config and compression_config. None: QUANTIZATION_NONE. Failures as the reader's. */
void quantization_config_read(struct quantization *q, const struct reader *root);

#endif
