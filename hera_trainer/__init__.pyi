from .alignment.alignment import Alignment as Alignment
from .alignment.contrast import Contrast as Contrast
from .alignment.temperature import TemperatureCallback as TemperatureCallback
from .alignment.window import StepWindow as StepWindow
from .config import HeRAConfig as HeRAConfig
from .data.collator import TeacherBatch as TeacherBatch
from .heads.accessor import HeadAccessor as HeadAccessor
from .heads.capture import HeadCapture as HeadCapture
from .heads.head import AttentionHead as AttentionHead
from .heads.heat_map import plot_head_scores as plot_head_scores
from .heads.layouts import decoder_accessor as decoder_accessor
from .heads.ranking import HeadRanking as HeadRanking
from .heads.ranking import rank_heads as rank_heads
from .heads.registry import get_head_accessor as get_head_accessor
from .heads.registry import register_head_accessor as register_head_accessor
from .objectives.contrastive import HeRALoss as HeRALoss
from .objectives.metrics import mutual_knn as mutual_knn
from .objectives.metrics import nearest_neighbors as nearest_neighbors
from .runs.monitor import AlignmentMonitorCallback as AlignmentMonitorCallback
from .runs.plots import plot_run as plot_run
from .runs.record import RunRecord as RunRecord
from .runs.record import read_run as read_run
from .runs.report import write_report as write_report
from .teacher.encoder import VisionTeacher as VisionTeacher
from .teacher.vectors import add_teacher_features as add_teacher_features
from .trainer import HeRATrainer as HeRATrainer

__version__: str
