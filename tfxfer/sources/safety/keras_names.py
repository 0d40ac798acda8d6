"""Names of Keras classes and functions that may stand in a model's config: a list to read, not code.

Made once from the public names of Keras 3.15.1 and kept by hand since. Left out on purpose: `Lambda` (bytecode),
`TFSMLayer` (loads a SavedModel by path), `JaxLayer`, `FlaxLayer`, `TorchModuleWrapper` (callables, pickles) and the
operations that take functions (`Map`, `Scan`, `Cond`, `WhileLoop` and their like). What is not here is refused.
"""


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Classes by the module that a Keras 3 config names.
CLASSES = {
    "keras.layers": _names(
        """
    Activation ActivityRegularization AdaptiveAveragePooling1D AdaptiveAveragePooling2D AdaptiveAveragePooling3D
    AdaptiveMaxPooling1D AdaptiveMaxPooling2D AdaptiveMaxPooling3D Add AdditiveAttention AlphaDropout Attention
    AugMix AutoContrast Average AveragePooling1D AveragePooling2D AveragePooling3D AvgPool1D AvgPool2D AvgPool3D
    BatchNormalization Bidirectional CategoryEncoding CenterCrop Concatenate
    ContrastLimitedAdaptiveHistogramEqualization Conv1D Conv1DTranspose Conv2D Conv2DTranspose Conv3D
    Conv3DTranspose ConvLSTM1D ConvLSTM2D ConvLSTM3D Convolution1D Convolution1DTranspose Convolution2D
    Convolution2DTranspose Convolution3D Convolution3DTranspose Cropping1D Cropping2D Cropping3D CutMix Dense
    DepthwiseConv1D DepthwiseConv2D Discretization Dot Dropout ELU EinsumDense Embedding Equalization Flatten GRU
    GRUCell GaussianDropout GaussianNoise GlobalAveragePooling1D GlobalAveragePooling2D GlobalAveragePooling3D
    GlobalAvgPool1D GlobalAvgPool2D GlobalAvgPool3D GlobalMaxPool1D GlobalMaxPool2D GlobalMaxPool3D
    GlobalMaxPooling1D GlobalMaxPooling2D GlobalMaxPooling3D GroupNormalization GroupQueryAttention HashedCrossing
    Hashing Identity InputLayer IntegerLookup LSTM LSTMCell Layer LayerNormalization LeakyReLU Masking
    MaxNumBoundingBoxes MaxPool1D MaxPool2D MaxPool3D MaxPooling1D MaxPooling2D MaxPooling3D Maximum MelSpectrogram
    Minimum MixUp MultiHeadAttention Multiply Normalization PReLU Permute Pipeline RMSNormalization RNN RandAugment
    RandomBrightness RandomColorDegeneration RandomColorJitter RandomContrast RandomCrop RandomElasticTransform
    RandomErasing RandomFlip RandomGaussianBlur RandomGrayscale RandomHue RandomInvert RandomPerspective
    RandomPosterization RandomRotation RandomSaturation RandomSharpness RandomShear RandomTranslation RandomZoom
    ReLU RepeatVector Rescaling Reshape Resizing ReversibleEmbedding STFTSpectrogram SeparableConv1D SeparableConv2D
    SeparableConvolution1D SeparableConvolution2D SimpleRNN SimpleRNNCell Softmax Solarization SpatialDropout1D
    SpatialDropout2D SpatialDropout3D SpectralNormalization StackedRNNCells StringLookup Subtract TextVectorization
    TimeDistributed UnitNormalization UpSampling1D UpSampling2D UpSampling3D Wrapper ZeroPadding1D ZeroPadding2D
    ZeroPadding3D
        """
    ),
    "keras.initializers": _names(
        """
    Constant GlorotNormal GlorotUniform HeNormal HeUniform Identity IdentityInitializer Initializer LecunNormal
    LecunUniform Ones Orthogonal OrthogonalInitializer RandomNormal RandomUniform STFT STFTInitializer
    TruncatedNormal VarianceScaling Zeros constant glorot_normal glorot_uniform he_normal he_uniform identity
    lecun_normal lecun_uniform ones orthogonal random_normal random_uniform stft truncated_normal variance_scaling
    zeros
        """
    ),
    "keras.regularizers": _names(
        """
    L1 L1L2 L2 OrthogonalRegularizer Regularizer l1 l1_l2 l2 orthogonal_regularizer
        """
    ),
    "keras.constraints": _names(
        """
    Constraint MaxNorm MinMaxNorm NonNeg UnitNorm max_norm min_max_norm non_neg unit_norm
        """
    ),
    "keras.optimizers": _names(
        """
    Adadelta Adafactor Adagrad Adam AdamW Adamax Ftrl Lamb Lion LossScaleOptimizer MultiOptimizer Muon Nadam
    Optimizer OptimizerMap RMSprop SGD ScheduleFreeAdamW
        """
    ),
    "keras.optimizers.schedules": _names(
        """
    CosineDecay CosineDecayRestarts ExponentialDecay InverseTimeDecay LearningRateSchedule PiecewiseConstantDecay
    PolynomialDecay
        """
    ),
    "keras.losses": _names(
        """
    BinaryCrossentropy BinaryFocalCrossentropy CTC CategoricalCrossentropy CategoricalFocalCrossentropy
    CategoricalGeneralizedCrossEntropy CategoricalHinge Circle CosineSimilarity Dice Hinge Huber KLDivergence
    LogCosh Loss MeanAbsoluteError MeanAbsolutePercentageError MeanSquaredError MeanSquaredLogarithmicError Poisson
    SparseCategoricalCrossentropy SquaredHinge Tversky
        """
    ),
    "keras.metrics": _names(
        """
    AUC Accuracy BinaryAccuracy BinaryCrossentropy BinaryIoU CategoricalAccuracy CategoricalCrossentropy
    CategoricalHinge ConcordanceCorrelation CosineSimilarity F1Score FBetaScore FalseNegatives FalsePositives Hinge
    IoU KLDivergence LogCoshError Mean MeanAbsoluteError MeanAbsolutePercentageError MeanIoU MeanMetricWrapper
    MeanSquaredError MeanSquaredLogarithmicError Metric OneHotIoU OneHotMeanIoU PearsonCorrelation Poisson Precision
    PrecisionAtRecall R2Score Recall RecallAtPrecision RootMeanSquaredError SensitivityAtSpecificity
    SparseCategoricalAccuracy SparseCategoricalCrossentropy SparseTopKCategoricalAccuracy SpecificityAtSensitivity
    SquaredHinge Sum TopKCategoricalAccuracy TrueNegatives TruePositives
        """
    ),
    "keras.dtype_policies": _names(
        """
    AWQDTypePolicy DTypePolicy DTypePolicyMap FloatDTypePolicy GPTQDTypePolicy Int4DTypePolicy QuantizedDTypePolicy
    QuantizedFloat8DTypePolicy
        """
    ),
    "keras.quantizers": _names(
        """
    AWQConfig AbsMaxQuantizer Float8QuantizationConfig GPTQConfig Int4QuantizationConfig Int8QuantizationConfig
    QuantizationConfig Quantizer
        """
    ),
    "keras.models": _names(
        """
    Functional Model Sequential
        """
    ),
    "keras.random": _names(
        """
    SeedGenerator
        """
    ),
    "keras": _names(
        """
    DTypePolicy FloatDTypePolicy Functional Layer Model Quantizer Sequential
        """
    ),
    "keras.mixed_precision": _names(
        """
    DTypePolicy Policy
        """
    ),
    "keras.src.models.functional": _names(
        """
    Functional
        """
    ),
    "keras.src.models.model": _names(
        """
    Model
        """
    ),
    "keras.src.models.sequential": _names(
        """
    Sequential
        """
    ),
    "keras.src.trainers.compile_utils": _names(
        """
    CompileLoss CompileMetrics MetricsList
        """
    ),
    "keras.src.losses.losses": _names(
        """
    LossFunctionWrapper
        """
    ),
    "keras.src.metrics.reduction_metrics": _names(
        """
    MeanMetricWrapper
        """
    ),
    "keras.src.random.seed_generator": _names(
        """
    SeedGenerator
        """
    ),
    "keras.src.applications.convnext": _names("LayerScale StochasticDepth"),
    "keras.src.applications.inception_resnet_v2": _names("CustomScaleLayer"),
    "keras.src.ops.core": _names(
        """
    Cast ConvertToTensor SaturateCast Scatter ScatterUpdate Slice SliceUpdate StopGradient Unstack
        """
    ),
    "keras.src.ops.einops": _names(
        """
    Rearrange
        """
    ),
    "keras.src.ops.image": _names(
        """
    AffineTransform CropImages ElasticTransform ExtractPatches GaussianBlur HSVToRGB MapCoordinates PadImages
    PerspectiveTransform RGBToGrayscale RGBToHSV Resize SSIM ScaleAndTranslate SobelEdges
        """
    ),
    "keras.src.ops.linalg": _names(
        """
    Cholesky CholeskyInverse Det Eig Eigh Inv JVP Lstsq LuFactor MatrixRank Norm Pinv Qr SVD Solve SolveTriangular
        """
    ),
    "keras.src.ops.math": _names(
        """
    CDist Erf Erfc Erfinv ExtractSequences FFT FFT2 IFFT2 IRFFT ISTFT InTopK Logdet Logsumexp RFFT Rsqrt STFT
    SegmentMax SegmentMin SegmentProd SegmentReduction SegmentSum TopK ViewAsComplex ViewAsReal
        """
    ),
    "keras.src.ops.nn": _names(
        """
    AdaptiveAveragePool AdaptiveMaxPool AveragePool BatchNorm BinaryCrossentropy CTCDecode CTCLoss
    CategoricalCrossentropy Celu Conv ConvTranspose DepthToSpace DepthwiseConv DotProductAttention Elu Fold Gelu Glu
    HardShrink HardSigmoid HardSilu HardTanh LayerNorm LeakyRelu LogSigmoid LogSoftmax MaxPool Moments MultiHot
    Normalize OneHot PSNR Polar RMSNorm Relu Relu6 Selu SeparableConv Sigmoid Silu SoftShrink Softmax Softplus
    Softsign SpaceToDepth SparseCategoricalCrossentropy SparsePlus SparseSigmoid Sparsemax Squareplus TanhShrink
    Threshold Unfold
        """
    ),
    "keras.src.ops.numpy": _names(
        """
    Abs Absolute Add All AllClose Amax Amin Angle Any Append Arange Arccos Arccosh Arcsin Arcsinh Arctan Arctan2
    Arctanh Argmax Argmin Argpartition Argsort Array ArraySplit Average Bincount BitwiseAnd BitwiseInvert
    BitwiseLeftShift BitwiseNot BitwiseOr BitwiseRightShift BitwiseXor BroadcastTo Cbrt Ceil Clip Concatenate Conj
    Conjugate Copy Corrcoef Correlate Cos Cosh CountNonzero Cross Cumprod Cumsum Deg2rad Diag Diagflat Diagonal Diff
    Digitize Divide DivideNoNan Dot Dsplit Dstack Einsum EmptyLike Equal Exp Exp2 ExpandDims Expm1 Fabs Flip Fliplr
    Flipud Floor FloorDivide Fmax Fmin Fmod Full FullLike Gcd Geomspace GetItem Greater GreaterEqual Heaviside
    Histogram Hsplit Hstack Hypot I0 Imag Inner IsIn Isclose Isfinite Isinf Isnan Isneginf Isposinf Isreal Kron Lcm
    Ldexp LeftShift Less LessEqual Linspace Log Log10 Log1p Log2 Logaddexp Logaddexp2 LogicalAnd LogicalNot
    LogicalOr LogicalXor Logspace Matmul Max Maximum Mean Median Meshgrid Min Minimum Mod Moveaxis Multiply NanToNum
    Nanargmax Nanargmin Nancumprod Nancumsum Nanmax Nanmean Nanmedian Nanmin Nanpercentile Nanprod Nanquantile
    Nanstd Nansum Nanvar Ndim Negative Nextafter Nonzero NotEqual OnesLike Outer Pad Percentile Power Prod Ptp
    Quantile Rad2deg Ravel Real Reciprocal Repeat Reshape RightShift Roll Rot90 Round SearchSorted Select Sign
    Signbit Sin Sinc Sinh Size Slogdet Sort Split Sqrt Square Squeeze Stack Std Subtract Sum Swapaxes Take
    TakeAlongAxis Tan Tanh Tensordot Tile Trace Transpose Trapezoid Tril Triu TrueDivide Trunc Unique UnravelIndex
    Vander Var Vdot View Vsplit Vstack Where ZerosLike
        """
    ),
}

# Classes of Keras 2 that its .h5 files name without a module and that Keras 3 has under no such name.
LEGACY_CLASSES = _names(
    """
    BatchNormalizationV1 BatchNormalizationV2 CuDNNGRU CuDNNLSTM GlorotUniformV2 L1L2 LocallyConnected1D
    LocallyConnected2D Loss LossFunctionWrapper MeanMetricWrapper OnesV2 Policy PolicyV1 RandomHeight RandomWidth
    Reduction Sequential SyncBatchNormalization ThresholdedReLU VarianceScaling ZerosV2
    """
)

# Keras 2 writes `x + 3.0` between layers as a TFOpLambda or SlicingOpLambda layer; the functions it may name.
LEGACY_FUNCTIONS = _names(
    """
    __operators__.add __operators__.eq __operators__.getitem __operators__.mul __operators__.ne __operators__.sub
    __operators__.truediv cast clip_by_value compat.v1.shape compat.v1.transpose concat expand_dims identity
    image.resize math.abs math.add math.divide math.exp math.l2_normalize math.log math.maximum math.minimum
    math.multiply math.negative math.pow math.reduce_max math.reduce_mean math.reduce_min math.reduce_sum math.rsqrt
    math.sigmoid math.sqrt math.square math.subtract math.tanh math.truediv nn.elu nn.gelu nn.leaky_relu nn.relu
    nn.relu6 nn.selu nn.sigmoid nn.silu nn.softmax nn.softplus nn.swish nn.tanh reshape shape slice split squeeze
    stack strided_slice tile transpose unstack
    """
)

# Functions that a string, or an object of class `function`, may name.
ACTIVATIONS = _names(
    """
    celu elu exponential gelu glu hard_shrink hard_sigmoid hard_silu hard_silu hard_swish hard_swish hard_tanh
    leaky_relu linear log_sigmoid log_softmax mish relu relu6 selu sigmoid silu soft_shrink softmax softplus
    softsign sparse_plus sparse_sigmoid sparsemax squareplus swish tanh tanh_shrink threshold thresholded_relu
    """
)
LOSSES_AND_METRICS = _names(
    """
    AUC Accuracy BCE BinaryAccuracy BinaryCrossentropy BinaryFocalCrossentropy BinaryIoU CTC CategoricalAccuracy
    CategoricalCrossentropy CategoricalFocalCrossentropy CategoricalGeneralizedCrossEntropy CategoricalHinge Circle
    ConcordanceCorrelation CosineSimilarity Dice F1Score FBetaScore FalseNegatives FalsePositives Hinge Huber IoU
    KLD KLDivergence LogCosh LogCoshError Loss MAE MAPE MSE MSLE Mean MeanAbsoluteError MeanAbsolutePercentageError
    MeanIoU MeanMetricWrapper MeanSquaredError MeanSquaredLogarithmicError Metric OneHotIoU OneHotMeanIoU
    PearsonCorrelation Poisson Precision PrecisionAtRecall R2Score Recall RecallAtPrecision RootMeanSquaredError
    SensitivityAtSpecificity SparseCategoricalAccuracy SparseCategoricalCrossentropy SparseTopKCategoricalAccuracy
    SpecificityAtSensitivity SquaredHinge Sum TopKCategoricalAccuracy TrueNegatives TruePositives Tversky acc
    accuracy auc bce binary_accuracy binary_crossentropy binary_focal_crossentropy categorical_accuracy
    categorical_crossentropy categorical_focal_crossentropy categorical_generalized_cross_entropy categorical_hinge
    ce circle concordance_correlation cosine_proximity cosine_similarity crossentropy ctc dice hinge huber
    huber_loss kl_divergence kld kullback_leibler_divergence log_cosh logcosh loss mae mape mean_absolute_error
    mean_absolute_percentage_error mean_squared_error mean_squared_logarithmic_error mse msle pearson_correlation
    poisson precision recall sparse_categorical_accuracy sparse_categorical_crossentropy
    sparse_top_k_categorical_accuracy squared_hinge top_k_categorical_accuracy tversky
    """
)
INITIALIZERS = _names(
    """
    Constant GlorotNormal GlorotUniform HeNormal HeUniform Identity IdentityInitializer Initializer LecunNormal
    LecunUniform Ones Orthogonal OrthogonalInitializer RandomNormal RandomUniform STFT STFTInitializer
    TruncatedNormal VarianceScaling Zeros constant glorot_normal glorot_uniform hamming hann he_normal he_uniform
    identity lecun_normal lecun_uniform normal one ones orthogonal random_normal random_uniform stft
    truncated_normal uniform variance_scaling zero zeros
    """
)
REGULARIZERS = _names(
    """
    L1 L1L2 L2 OrthogonalRegularizer Regularizer l1 l1_l2 l1l2 l2 orthogonal_regularizer
    """
)
CONSTRAINTS = _names(
    """
    Constraint MaxNorm MinMaxNorm NonNeg UnitNorm max_norm maxnorm min_max_norm non_neg nonneg unit_norm unitnorm
    """
)
OPTIMIZERS = _names(
    """
    Adadelta Adafactor Adagrad Adam AdamW Adamax Ftrl Lamb Lion LossScaleOptimizer MultiOptimizer Muon Nadam
    Optimizer OptimizerMap RMSprop SGD ScheduleFreeAdamW adadelta adafactor adagrad adam adamax adamw ftrl lamb lion
    lossscaleoptimizer multioptimizer muon nadam optimizer optimizermap rmsprop schedulefreeadamw sgd
    """
)
